"""The product of a few rows with a matrix that is read once, on tensor cores, in Triton; imported only where that is.

A program has a tile of the matrix's rows and multiplies it with all rows of the input. The matrix stands left, where
tensor cores want 64 rows, and the input right, where 16 are enough. Where tiles are fewer than a GPU has cores,
several programs share one, each with a part of the columns; the last of them to end adds the parts up, always in the
same order, so that a product is the same every time.

INT8 and INT4 that meet 16-bit inputs stand in words of 16 bits, see `runtime.kernels.words`. There one instruction
makes bfloat16 numbers of two words: 0x4300 is 128, and the seven bits below are its units, so a nibble set into it is
the number 128 more. (The trick is that of Kim et al. 2022, arXiv 2211.10017, in bfloat16.) E2M1 has the sign, exponent
and first bit of a bfloat16 that is 2^126 times smaller, whose numbers below 1 are subnormal as its own are.

Axes in names: R rows, I in_features, O out_features, W words of a row, G groups of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimtab.runtime.kernels.tile import Tile
from trimtab.runtime.kernels.words import WORD

#: Triton's interpreter knows neither instructions of a GPU nor bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: Products of FP8 that a tensor core may add up in its own 14 bits before they go into float32.
EXACT_EVERY = 128


class Matmul:
    """x @ matrix.T for few rows, one product at a time: what counts the programs is the layer's.

    Args:
        weight: [O, I] in the type of the input, or words int16 [O, W].
        scale: float32 [1] or [O], of the outputs; of INT4 [G, O], of the numbers.
        bits: of a number in a word, 8 or 4; 0 where there are no words.
        group_size: numbers of a row that share a scale in four bits.
        floats: whether the four bits are E2M1, of which a tile may have several groups.

    Raises:
        ValueError: the tile does not divide the matrix.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        tile: Tile,
        bits: int = 0,
        group_size: int = 0,
        floats: bool = False,
    ):
        rows, stored = weight.shape
        if not tile.divides(rows, stored, 0 if floats and not tile.inputs % group_size else group_size):
            group = f" in groups of {group_size}" * bool(group_size)
            raise ValueError(f"a tile of {tile.outputs} x {tile.inputs} does not divide {rows} x {stored}{group}")
        self._weight, self._scale, self._tile, self._bits, self._group_size = weight, scale, tile, bits, group_size
        self._floats = floats
        #: Programs that have ended, by tile; zeros between two products.
        self._ended = torch.zeros(rows // tile.outputs, dtype=torch.int32, device=weight.device)

    def __call__(self, x_RI: torch.Tensor) -> torch.Tensor:
        """Returns bfloat16 [R, O]; of words, bfloat16 is the input's type too."""
        count, (rows, stored), tile = len(x_RI), self._weight.shape, self._tile
        padded = max(16, triton.next_power_of_2(count))
        y_RO = x_RI.new_empty(count, rows, dtype=torch.bfloat16)
        sums = self._scale
        if tile.parts > 1:
            sums = x_RI.new_empty(tile.parts * rows * padded, dtype=torch.float32)
        grouped = "by group" if self._group_size else "by row" if self._scale.numel() > 1 else "once"
        exact = min(EXACT_EVERY, tile.inputs) if x_RI.dtype == torch.float8_e4m3fn else None
        _multiply[rows // tile.outputs, tile.parts](
            x_RI.contiguous(), self._weight, self._scale, y_RO, sums, self._ended, count, rows, stored,
            BITS=self._bits, FLOATS=self._floats, SCALED=grouped, GROUP=self._group_size or 1, ROWS=padded,
            OUT=tile.outputs, IN=tile.inputs, PARTS=tile.parts,
            SUMS=tl.int32 if x_RI.dtype == torch.int8 else tl.float32, EXACT=exact, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        return y_RO


@triton.jit(do_not_specialize=["count"])  # or it would be compiled anew for one row, and for sixteen
def _multiply(
    x, weight, scale, y, sums, ended, count, rows, stored,
    BITS: tl.constexpr, FLOATS: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    out = tile * OUT + tl.arange(0, OUT)
    row, column = tl.arange(0, ROWS), tl.arange(0, IN)
    columns = stored * (16 // BITS if BITS else 1)
    each = tl.cdiv(tl.cdiv(stored, IN), PARTS) * IN
    first = part * each
    stop = tl.minimum(stored, first + each)
    there = row[None, :] < count
    at_weight = weight + out.to(tl.int64)[:, None] * stored + column[None, :]
    at_x = x + row[None, :] * columns + column[:, None]
    found = tl.zeros([OUT, ROWS], SUMS)
    for begin in range(first, stop, IN):
        w = tl.load(at_weight + begin)
        x0 = tl.load(at_x + begin, mask=there, other=0.0)
        if BITS == 0:
            found = tl.dot(w, x0, found, out_dtype=SUMS, max_num_imprecise_acc=EXACT)
        elif BITS == 8:
            x1 = tl.load(at_x + stored + begin, mask=there, other=0.0)
            w0, w1 = _halves(w)
            found = tl.dot(w0, x0.to(w0.dtype), found)
            found = tl.dot(w1, x1.to(w1.dtype), found)
        else:
            x1 = tl.load(at_x + stored + begin, mask=there, other=0.0)
            x2 = tl.load(at_x + 2 * stored + begin, mask=there, other=0.0)
            x3 = tl.load(at_x + 3 * stored + begin, mask=there, other=0.0)
            w0, w1, w2, w3 = _quarters(w, FLOATS)
            w0 *= _scales(scale + out, begin, rows, GROUP, OUT, IN).to(w0.dtype)
            w1 *= _scales(scale + out, stored + begin, rows, GROUP, OUT, IN).to(w1.dtype)
            w2 *= _scales(scale + out, 2 * stored + begin, rows, GROUP, OUT, IN).to(w2.dtype)
            w3 *= _scales(scale + out, 3 * stored + begin, rows, GROUP, OUT, IN).to(w3.dtype)
            found = tl.dot(w0, x0.to(w0.dtype), found)
            found = tl.dot(w1, x1.to(w1.dtype), found)
            found = tl.dot(w2, x2.to(w2.dtype), found)
            found = tl.dot(w3, x3.to(w3.dtype), found)
    found = found.to(tl.float32)
    if PARTS > 1:
        at_sums = sums + out[:, None] * ROWS + row[None, :]
        tl.store(at_sums + part * rows * ROWS, found)
        tl.debug_barrier()  # all threads have stored before the one that counts says so
        before = tl.atomic_add(ended + tile, 1)
        if before < PARTS - 1:
            return
        tl.debug_barrier()
        found = tl.zeros([OUT, ROWS], tl.float32)
        for other in range(PARTS):
            found += tl.load(at_sums + other * rows * ROWS, cache_modifier=".cg")
        tl.store(ended + tile, 0)
    if SCALED == "by row":
        found *= tl.load(scale + out)[:, None]
    elif SCALED == "once":
        found *= tl.load(scale)
    tl.store(y + row[None, :] * rows + out[:, None], found.to(y.dtype.element_ty), mask=there)


@triton.jit
def _scales(at, begin, rows, GROUP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """What the numbers of a tile are multiplied by: one for all of a row, [OUT, 1], or by group, [OUT, IN]."""
    if GROUP >= IN:
        return tl.load(at + begin // GROUP * rows)[:, None]
    else:
        group = begin // GROUP + tl.arange(0, IN // GROUP)
        each = tl.load(at[:, None] + group[None, :] * rows)
        return tl.reshape(tl.broadcast_to(each[:, :, None], [OUT, IN // GROUP, GROUP]), [OUT, IN])


def widen(
    words: torch.Tensor, bits: int, scale: torch.Tensor | None = None, group_size: int = 0, floats: bool = False
) -> torch.Tensor:
    """Returns the numbers of words int16 [O, W] as bfloat16 [O, I], those of four bits times their scales [G, O]."""
    rows, stored = words.shape
    wide_OI = torch.empty(rows, stored * (WORD // bits), dtype=torch.bfloat16, device=words.device)
    _widen[rows, triton.cdiv(stored, 1024)](
        words, words if scale is None else scale, wide_OI, rows, stored,
        BITS=bits, FLOATS=floats, GROUP=group_size or 1, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return wide_OI


@triton.jit
def _widen(
    words, scale, wide, rows, stored,
    BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < stored
    word = tl.load(words + row.to(tl.int64) * stored + at, mask=inside, other=0)
    wide += row.to(tl.int64) * stored * (16 // BITS) + at
    kind = wide.dtype.element_ty
    if BITS == 8:
        w0, w1 = _halves(word)
        tl.store(wide, w0.to(kind), mask=inside)
        tl.store(wide + stored, w1.to(kind), mask=inside)
    else:
        scale += row
        w0, w1, w2, w3 = _quarters(word, FLOATS)
        w0 *= tl.load(scale + at // GROUP * rows, mask=inside, other=0.0).to(w0.dtype)
        w1 *= tl.load(scale + (stored + at) // GROUP * rows, mask=inside, other=0.0).to(w1.dtype)
        w2 *= tl.load(scale + (2 * stored + at) // GROUP * rows, mask=inside, other=0.0).to(w2.dtype)
        w3 *= tl.load(scale + (3 * stored + at) // GROUP * rows, mask=inside, other=0.0).to(w3.dtype)
        tl.store(wide, w0.to(kind), mask=inside)
        tl.store(wide + stored, w1.to(kind), mask=inside)
        tl.store(wide + 2 * stored, w2.to(kind), mask=inside)
        tl.store(wide + 3 * stored, w3.to(kind), mask=inside)


@triton.jit
def _e2m1(code):
    """The number of each code, float32: sign, two bits of exponent, one behind the point, without any below 1."""
    size = (code & 7).to(tl.float32)
    above = (1 + (code & 1) * 0.5) * tl.exp2(((code & 7) >> 1).to(tl.float32) - 1)
    return tl.where(size < 2, size * 0.5, above) * (1 - 2 * ((code >> 3) & 1).to(tl.float32))


@triton.jit
def _quarters(word, FLOATS: tl.constexpr):
    """The four numbers of each word, INT4 or E2M1."""
    if INTERPRETED and FLOATS:
        return _e2m1(word & 15), _e2m1((word >> 4) & 15), _e2m1((word >> 8) & 15), _e2m1((word >> 12) & 15)
    elif FLOATS:
        return tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 sign, size, power, nothing;
            mov.b32 power, 0x7E807E80;
            mov.b32 nothing, 0x80008000;
            shl.b32 sign, $4, 12;
            shl.b32 size, $4, 6;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 $0, size, 0x01C001C0, sign, 0xEA;
            shl.b32 sign, $4, 8;
            shl.b32 size, $4, 2;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 $1, size, 0x01C001C0, sign, 0xEA;
            shl.b32 sign, $4, 4;
            shr.u32 size, $4, 2;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 $2, size, 0x01C001C0, sign, 0xEA;
            shr.u32 size, $4, 6;
            and.b32 sign, $4, 0x80008000;
            lop3.b32 $3, size, 0x01C001C0, sign, 0xEA;
            fma.rn.bf16x2 $0, $0, power, nothing;
            fma.rn.bf16x2 $1, $1, power, nothing;
            fma.rn.bf16x2 $2, $2, power, nothing;
            fma.rn.bf16x2 $3, $3, power, nothing;
            }""",  # power is 2^126, nothing -0
            constraints="=&r,=&r,=&r,=&r,r", args=[word],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif INTERPRETED:
        w0, w1, w2, w3 = word & 15, (word >> 4) & 15, (word >> 8) & 15, (word >> 12) & 15
        return w0.to(tl.float32) - 8, w1.to(tl.float32) - 8, w2.to(tl.float32) - 8, w3.to(tl.float32) - 8
    else:
        return tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 second, third, fourth, one, less;
            shr.u32 second, $4, 4;
            shr.u32 third, $4, 8;
            shr.u32 fourth, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, second, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, third, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, fourth, 0x000F000F, 0x43004300, 0xEA;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            fma.rn.bf16x2 $0, $0, one, less;
            fma.rn.bf16x2 $1, $1, one, less;
            fma.rn.bf16x2 $2, $2, one, less;
            fma.rn.bf16x2 $3, $3, one, less;
            }""",  # less is -136: the 128 of 0x4300, and the 8 that the number stands higher
            constraints="=&r,=&r,=&r,=&r,r", args=[word],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _halves(word):
    """The two INT8 numbers of each word: the seven bits below the sign's, less 128 where that is set."""
    if INTERPRETED:
        return word.to(tl.int8).to(tl.float32), (word >> 8).to(tl.int8).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 second, sign, second_sign, minus;
            shr.u32 second, $2, 8;
            lop3.b32 $0, $2, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 $1, second, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 second_sign, second, 0x00800080, 0x43004300, 0xEA;
            mov.b32 minus, 0xBF80BF80;
            fma.rn.bf16x2 $0, sign, minus, $0;
            fma.rn.bf16x2 $1, second_sign, minus, $1;
            }""",  # with the sign, 0x4300 is 0x4380: 256
            constraints="=&r,=&r,r", args=[word], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
