"""Products on a CPU: the one place that decides in which type a processor multiplies, and how a weight is read for it.

Models are in bfloat16. A processor with instructions for it (AMX, AVX512-BF16) multiplies that fast. Without them
PyTorch falls back to loops that are ten times slower than float32, or eighty where the weight is row-major as in
`x @ w`; so there a product is computed in float32. A bfloat16 is a float32 whose lower half is zero and the product of
two has 16 bits, so float32 products are exact, their sums at least as good as bfloat16's instructions give them, and
the output is rounded to bfloat16 either way: baseline and candidate compute the same numbers on both kinds, but for the
order of sums.

A float32 copy of the weights would be the fastest to multiply, and would double the memory of a model; a packed one's
would have eight times the bytes that it was quantized for. So weights stay as they are, and some rows at a time are
widened into a buffer that stays in the processor's cache: that costs a fifth of the product of a few rows, and less of
more. One or two are multiplied by PyTorch's own bfloat16 loop, which is as fast as float32. A weight that no one else
reads is stored inputs first (`laid_out`), which costs no memory and is faster for any number of rows.

Axes in names: R rows (tokens), I in_features, O out_features.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

#: Weights that are widened at once for each thread: 1 MiB of float32, which the second-level cache of a core holds.
TILE = 256 << 10
#: So many rows at most are multiplied outputs first.
FEW = 64
#: With each so many rows tiles are larger by one, up to so many times: BLAS packs what it multiplies.
LONGER, LARGEST = 32, 4
#: So few rows are multiplied one after the other by loops for bfloat16, at least as fast as float32 is multiplied.
VECTORS = 2
#: Tiles are whole multiples of this many outputs.
BLOCK = 16

#: outputs a tile may have -> the tiles of a weight: some of its rows, [n, I], which the next tile may overwrite, and
#: which these are.
Tiles = Callable[[int], Iterator[tuple[torch.Tensor, slice]]]


@functools.cache
def dtype() -> torch.dtype:
    """Returns the type in which this processor multiplies bfloat16 fastest: bfloat16, or float32.

    What a processor has is asked first; some announce bfloat16 and emulate it, so what is left is timed.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    x, w = torch.ones(64, 768), torch.ones(768, 768)
    works = {kind: functools.partial(F.linear, x.to(kind), w.to(kind)) for kind in (torch.bfloat16, torch.float32)}
    seconds = fastest(works)
    return min(seconds, key=seconds.__getitem__)


@functools.cache
def multiplies_integers() -> bool:
    """Returns whether `torch._int_mm` is how this processor multiplies INT8 by INT8: exact, and faster than `exact`.

    With instructions for bytes oneDNN does it. Without them its sums saturate on Intel's processors, and on AMD's
    PyTorch falls back to a loop that took thirty times as long as float32; so both are tried.
    """
    if not _integers_are_exact():
        return False
    x_RI, w_OI = torch.ones(64, 768, dtype=torch.int8), torch.ones(768, 768, dtype=torch.int8)
    return is_faster(lambda: torch._int_mm(x_RI, w_OI.t()), lambda: exact(x_RI, w_OI), rounds=3)


def _integers_are_exact() -> bool:
    """Returns whether `torch._int_mm` computes its sums in 32 bits here: tried on the largest numbers of both signs."""
    signs = torch.tensor([127, -128], dtype=torch.int8)
    a_RI, b_IO = signs.repeat(16)[:, None].expand(32, 64).contiguous(), signs.repeat(16).expand(64, 32).contiguous()
    expected = 64 * a_RI[:, :1].int() * b_IO[:1].int()
    return all(torch.equal(torch._int_mm(a_RI[:rows], b_IO), expected[:rows]) for rows in (1, 2, 32))


def outputs_first(rows: int, kind: torch.dtype) -> bool:
    """Returns whether so few rows are multiplied quicker here when the long side, the outputs, comes first.

    That is timed, for one row and for several. On an Intel processor MKL was quicker so in float32, and oneDNN in
    bfloat16 by up to a half; on an AMD one MKL took up to three times as long as it does the other way round.
    """
    return _outputs_first(1 if rows == 1 else 8, kind)


@functools.cache
def _outputs_first(rows: int, kind: torch.dtype) -> bool:
    x_RI, w_OI = torch.ones(rows, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    return is_faster(lambda: torch.mm(w_OI, columns(x_RI)), lambda: torch.mm(x_RI, w_OI.t()))


def columns(x_RI: torch.Tensor) -> torch.Tensor:
    """Returns rows as columns, [I, R]; a single one twice.

    They are not moved: libraries read either order, and of a single product of few rows that is the quicker way. Of one
    column PyTorch makes a product of a matrix and a vector, which took twice the time of two in bfloat16.
    """
    return (x_RI if len(x_RI) > 1 else x_RI.expand(2, -1)).t()


def describe() -> str:
    """Returns in a few words how this processor computes."""
    how = "bfloat16 products" if dtype() == torch.bfloat16 else "float32 products of bfloat16 numbers"
    return f"{how} on a CPU ({torch.backends.cpu.get_cpu_capability()})"


def fastest(works: dict, rounds: int = 5) -> dict:
    """Returns the seconds of each work in its fastest round; they take turns, so that a busy machine disturbs all."""
    found = dict.fromkeys(works, float("inf"))
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:  # the first loads kernels
                found[name] = min(found[name], time.perf_counter() - started)
    return found


def is_faster(work: Callable[[], object], other: Callable[[], object], rounds: int = 5) -> bool:
    """Returns whether a work takes less time here than another, by `fastest`."""
    seconds = fastest({True: work, False: other}, rounds)
    return seconds[True] < seconds[False]


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns `F.linear` of tensors in bfloat16, in bfloat16."""
    y_RO = quickest(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    # Rows that lie in memory as they do behind a model's own layer, whose features some read as complex numbers.
    return y_RO.to(x.dtype).contiguous().reshape(*x.shape[:-1], len(weight_OI))


def scaled(x_RI: torch.Tensor, weight_OI: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    """Returns x @ w.T of tensors in bfloat16 times float32 scales, bfloat16 [R, O].

    Args:
        scales: each a scalar, one an output [O], or one a row [R, 1].
    """
    y_RO = quickest(x_RI, weight_OI)
    if len(scales) > 1 or scales[0].dim():  # by a scalar PyTorch multiplies bfloat16 in float32 and rounds, in one pass
        y_RO = y_RO.float()
    for scale in scales:
        y_RO.mul_(scale)
    return y_RO.bfloat16()


def quickest(x_RI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns `F.linear` of tensors in bfloat16, [R, O], in float32 where that is what multiplies them here.

    Inputs that bfloat16 holds may be float32 where the weight is `laid_out` and that multiplies it.
    """
    rows, kind = len(x_RI), dtype()
    if kind == torch.float32 and weight_OI.stride(0) < weight_OI.stride(1):
        y_RO = (gathered if 0 < rows <= VECTORS else accumulated)(x_RI, weight_OI.t())
        return y_RO if bias_O is None else y_RO.add_(bias_O)
    if kind == torch.float32 and rows > 1:
        y_RO = row_by_row(x_RI, weight_OI) if rows <= VECTORS else exact(x_RI, weight_OI)
        return y_RO if bias_O is None else y_RO.add_(bias_O)
    if kind == torch.float32 or not 0 < rows <= FEW or not outputs_first(rows, kind):
        return F.linear(x_RI, weight_OI, bias_O)
    if bias_O is None:
        return torch.mm(weight_OI, columns(x_RI)).t()[:rows]
    return torch.addmm(bias_O[:, None], weight_OI, columns(x_RI)).t()[:rows]


def laid_out(weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns a weight in bfloat16, [O, I] as before, as its products are fastest here: inputs first in memory where
    they are computed in float32.

    So neither factor is transposed, and a tile, some inputs of all outputs, is one run of memory.
    """
    return weight_OI.t().contiguous().t() if dtype() == torch.float32 else weight_OI


def accumulated(x_RI: torch.Tensor, weight_IO: torch.Tensor) -> torch.Tensor:
    """Returns x @ w, float32 [R, O], of a weight stored inputs first: the sum of the products of tiles, which are some
    inputs of it widened to float32."""
    in_features, out_features = weight_IO.shape
    # Each tile reads and writes all sums once, so of many rows tiles are longer.
    step = tile_length(in_features, out_features, longer(len(x_RI) // LARGEST))
    tile_IO = scratch("tile", torch.float32, step, out_features)
    y_RO = torch.zeros(len(x_RI), out_features)
    for x, w in zip(x_RI.float().split(step, 1), weight_IO.split(step), strict=True):
        y_RO.addmm_(x, tile_IO[: len(w)].copy_(w))
    return y_RO


def gathered(x_RI: torch.Tensor, weight_IO: torch.Tensor) -> torch.Tensor:
    """Returns x @ w, bfloat16 [R, O], of a weight stored inputs first, for a row or two.

    PyTorch's own product of such a weight and a vector is eighty times slower than float32's. An embedding bag is the
    same sum, of a table's rows times weights, in float32; it reads ahead and took four fifths of float32's time. A bag
    has one thread, so there is one for each part of the outputs: the table then has more rows, which are shorter.
    """
    (rows, in_features), out_features = x_RI.shape, weight_IO.shape[1]
    indices_BI = _indices(rows, in_features, out_features, torch.get_num_threads())
    parts = len(indices_BI) // rows
    x_BI = x_RI.bfloat16()
    return F.embedding_bag(
        indices_BI,
        weight_IO.view(in_features * parts, out_features // parts),
        per_sample_weights=x_BI.repeat_interleave(parts, 0) if parts > 1 else x_BI,
        mode="sum",
    ).view(rows, out_features)


@functools.lru_cache(64)
def _indices(rows: int, in_features: int, out_features: int, threads: int) -> torch.Tensor:
    """Returns which rows of its table each bag of `gathered` sums, int32 [rows * parts, I]."""
    parts = max(n for n in range(1, threads + 1) if n == 1 or out_features % (n * BLOCK) == 0)
    with torch.inference_mode(False):
        indices_IP = torch.arange(in_features * parts, dtype=torch.int32).view(in_features, parts)
        return indices_IP.t().repeat(rows, 1)


def row_by_row(x_RI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns `F.linear` of tensors in bfloat16, [R, O], by PyTorch's loop for a matrix and a vector, which sums in
    float32: a tile of the weight is multiplied with all rows while the cache has it."""
    y_RO = torch.empty(len(x_RI), len(weight_OI), dtype=torch.bfloat16)
    step = max(1, 2 * TILE * torch.get_num_threads() // x_RI.shape[1])  # as many bytes as of float32
    for start in range(0, len(weight_OI), step):
        here = slice(start, start + step)
        for x_I, y_O in zip(x_RI, y_RO, strict=True):
            torch.mv(weight_OI[here], x_I, out=y_O[here])
    return y_RO


def exact(x_RI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns `F.linear` in float32 of numbers that are stored in fewer bits, float32 [R, O]."""
    return product(x_RI, widened(weight_OI, torch.float32), len(weight_OI), torch.float32)


def widened(weight_OI: torch.Tensor, kind: torch.dtype) -> Tiles:
    """Returns the tiles of a stored weight, in a type that holds its numbers."""

    def tiles(step: int) -> Iterator[tuple[torch.Tensor, slice]]:
        tile_OI = scratch("tile", kind, step, weight_OI.shape[1])
        for start, part in zip(range(0, len(weight_OI), step), weight_OI.split(step), strict=True):
            yield tile_OI[: len(part)].copy_(part), slice(start, start + step)

    return tiles


class _Held(threading.local):
    """Buffers of each thread."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_held = _Held()


def scratch(name: str, kind: torch.dtype, *shape: int) -> torch.Tensor:
    """Returns a tensor of this shape with any content; the thread's next call with this name and type takes it back.

    Fresh memory comes a page at a time, which for a tile would cost as much as filling it.
    """
    size = math.prod(shape)
    held = _held.buffers.get((name, kind))
    if held is None or len(held) < size:
        with torch.inference_mode(False):
            held = _held.buffers[name, kind] = torch.empty(size, dtype=kind)
    return held[:size].view(shape)


def product(x_RI: torch.Tensor, tiles: Tiles, out_features: int, kind: torch.dtype) -> torch.Tensor:
    """Returns x @ w.T of a weight that is unpacked tile by tile, [R, O] in the type of `kind`.

    Args:
        tiles: of the weight, in `kind`.
        kind: float32, or bfloat16 on a processor that multiplies it.
    """
    count, in_features = x_RI.shape
    step = tile_length(out_features, in_features, LARGEST if kind == torch.bfloat16 else longer(count))
    if 1 < count <= FEW and outputs_first(count, kind):
        x_IR = columns(x_RI).to(kind).contiguous()  # moved, for there may be many tiles
        y_OR = torch.empty(out_features, count, dtype=kind)
        for w_OI, here in tiles(step):
            torch.mm(w_OI, x_IR, out=y_OR[here])
        return y_OR.t()
    x_RI = x_RI.to(kind)
    y_RO = torch.empty(count, out_features, dtype=kind)
    for w_OI, here in tiles(step):
        torch.mm(x_RI, w_OI.t(), out=y_RO[:, here])
    return y_RO


def longer(rows: int) -> int:
    """Returns how many times longer tiles of float32 are for so many rows."""
    return max(1, min(rows // LONGER, LARGEST))


def tile_length(size: int, across: int, times: int) -> int:
    """Returns how much of a side of a weight a tile has, and all of the other side, `across`; a multiple of `BLOCK`."""
    most = max(BLOCK, times * TILE * torch.get_num_threads() // across // BLOCK * BLOCK)
    tiles = max(1, -(-size // most))
    return -(-size // tiles // BLOCK) * BLOCK  # all of a size, if they can be


class Linear(nn.Linear):
    """A linear layer in bfloat16 as this processor multiplies it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        return linear(input, self.weight, self.bias)


def use(model: nn.Module) -> None:
    """Makes the linear layers of a model on a CPU multiply as this processor does it fast; their weights stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = Linear
