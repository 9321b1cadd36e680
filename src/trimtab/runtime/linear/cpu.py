"""Quantized layers on a CPU: PyTorch's packed kernels for few rows, `runtime.linear.cpu_products` for many.

Axes in names: see `runtime.linear.packed`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial

import torch

from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.linear import cpu_products
from trimtab.runtime.linear.packed import PackedLinear

#: Weights of a group that the kernel of INT4 takes.
_INT4_GROUPS = (32, 64, 128, 256)


Multiply = Callable[[torch.Tensor], torch.Tensor]

#: Rows up to which a packed kernel with vector code is faster than the dense product: INT4 takes longer to unpack.
_PACKED_ROWS = {"_weight_int8pack_mm": 16, "_weight_int4pack_mm_for_cpu": 32}


def packed_rows(kernel: str, packed: Multiply, dense: Multiply, in_features: int) -> int:
    """Returns the rows up to which a packed kernel is the faster one, 0 where PyTorch has no vector code for it.

    Where it has, one row takes a third of the dense product's time; where it has none, six times as much. So a first
    layer is timed for each kernel, and no noise turns the answer round.
    """

    def is_fast() -> bool:
        x_RI = torch.ones(1, in_features, dtype=torch.bfloat16)
        seconds = cpu_products.fastest({"packed": lambda: packed(x_RI), "dense": lambda: dense(x_RI)}, rounds=3)
        return seconds["packed"] < seconds["dense"]

    if kernel not in _fast:
        with torch.inference_mode():
            _fast[kernel] = is_fast()
    return _PACKED_ROWS[kernel] if _fast[kernel] else 0


_fast: dict[str, bool] = {}


class Int8WeightOnly(PackedLinear):
    """INT8 weights with a scale for each output channel, rounded to the bfloat16 of the activations."""

    kernel = "_weight_int8pack_mm"
    products = (("int8", "row", None),)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether every row begins at a multiple of 16 bytes: the kernel crashes the process on others."""
        return layer.shape[1] % 16 == 0 and layer.weight.data_ptr() % 16 == 0

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.keep(weight_OI=layer.weight, scale_O=layer.weight_scale.reshape(-1).bfloat16())
        self.packed_rows = packed_rows(self.kernel, self.packed, self.dense, self.in_features)

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x_RI.contiguous(), self.weight_OI, self.scale_O)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        kind = cpu_products.dtype()
        y_RO = cpu_products.product(x_RI, cpu_products.widened(self.weight_OI, kind), self.out_features, kind)
        return y_RO.mul_(self.scale_O).bfloat16()


class Int4WeightOnly(PackedLinear):
    """INT4 weights with a scale for each group of a row, in the layout of PyTorch's CPU kernel.

    That layout is private to PyTorch (ATen/native/cpu/int4mm_kernel.cpp): rows stand in blocks of 64 with
    AVX-512, 32 with AVX2; in a whole block the two nibbles of a byte are half a block apart, in the last,
    smaller one they are neighbours. `fits` packs and unpacks the layer to see that this still holds.
    """

    kernel = "_weight_int4pack_mm_for_cpu"
    products = (("int4", "group", None),)

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.group_size = layer.layout.group_size
        scale_GO = layer.weight_scale.bfloat16().t()
        # The kernel computes (q - 8) * scale + zero.
        scale_zero_GO2 = torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1).contiguous()
        self.keep(weight=self.pack(layer), scale_zero_GO2=scale_zero_GO2)
        self.packed_rows = packed_rows(self.kernel, self.packed, self.dense, self.in_features)

    @staticmethod
    def pack(layer: Quantized) -> torch.Tensor:
        """Returns the layer's numbers in the kernel's layout."""
        nibbles_OI = layer_layout.numbers(layer).to(torch.int32) + 8
        return torch._convert_weight_to_int4pack_for_cpu(nibbles_OI, 1)  # the second argument is unused on CPUs

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the kernel takes this shape and its layout is the known one."""
        out_features, in_features = layer.shape
        if out_features % 16 or in_features % 2 or layer.layout.group_size not in _INT4_GROUPS:
            return False
        found_OI = torch.empty(out_features, in_features, dtype=torch.uint8)
        for nibbles_IO, place in _nibbles(Int4WeightOnly.pack(layer), out_features, out_features):
            part = place(found_OI)
            part.copy_(nibbles_IO.t().view_as(part))
        return torch.equal(found_OI.to(torch.int8) - 8, layer_layout.numbers(layer))

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        x_RI = x_RI.contiguous()
        return torch._weight_int4pack_mm_for_cpu(x_RI, self.weight, self.group_size, self.scale_zero_GO2)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        kind = cpu_products.dtype()
        return cpu_products.product(x_RI, self._tiles(kind), self.out_features, kind, stored_IO=True).bfloat16()

    def _tiles(self, kind: torch.dtype) -> cpu_products.Tiles:
        """The weight's numbers (q - 8) * scale, which float32 holds and bfloat16 rounds."""

        def tiles(step: int) -> Iterator[tuple[torch.Tensor, Place]]:
            scale_OG = self.scale_zero_GO2[..., 0].to(kind).t()
            for nibbles_IO, place in _nibbles(self.weight, self.out_features, 2 * step):  # of which a tile has half
                w_IO = cpu_products.scratch("tile", kind, *nibbles_IO.shape).copy_(nibbles_IO)
                w_GSO = w_IO.view(-1, self.group_size, w_IO.shape[1])
                scale_G1O = place(scale_OG).movedim(-1, 0).flatten(1)[:, None]
                torch.addcmul(scale_G1O * -8, w_GSO, scale_G1O, out=w_GSO)
                yield w_IO.t(), place

        return tiles


#: Of something with an axis of outputs in front, the part that belongs to a tile, [..., n].
Place = Callable[[torch.Tensor], torch.Tensor]


def _nibbles(packed: torch.Tensor, out_features: int, step: int) -> Iterator[tuple[torch.Tensor, Place]]:
    """Yields the kernel's layout as numbers from 0 to 15, uint8 [in, n], and of which outputs they are.

    A tile has the lower or the upper halves of several blocks: so nothing is moved but bytes in runs of 16 or 32.
    """
    block, data = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32, packed.reshape(-1)
    columns, half = len(data) * 2 // out_features, block // 2
    whole = out_features // block * block
    blocks = data[: whole * columns // 2].view(-1, columns, half)
    for first in range(0, len(blocks), max(1, step // block)):
        some = blocks[first : first + max(1, step // block)]
        bytes_IO = cpu_products.scratch("bytes", torch.uint8, columns, len(some) * half)
        runs = bytes_IO.view(torch.complex128).view(columns, len(some), -1)  # 16 bytes a number: one move each
        runs.copy_(some.view(torch.complex128).transpose(0, 1))
        nibbles_IO = cpu_products.scratch("nibbles", torch.uint8, *bytes_IO.shape)
        for upper, take in ((0, torch.bitwise_and), (1, torch.bitwise_right_shift)):
            yield take(bytes_IO, 4 if upper else 15, out=nibbles_IO), partial(_halves, first, len(some), half, upper)
    rest = data[whole * columns // 2 :].view(columns, -1)
    if rest.numel():
        yield rest & 15, operator.itemgetter(slice(whole, None, 2))
        yield rest >> 4, operator.itemgetter(slice(whole + 1, None, 2))


def _halves(first: int, count: int, half: int, upper: int, of_outputs: torch.Tensor) -> torch.Tensor:
    here = of_outputs[first * 2 * half : (first + count) * 2 * half]
    return here.unflatten(0, (count, 2, half))[:, upper]
