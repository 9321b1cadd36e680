"""Quantized layers on a CPU: PyTorch's packed kernels for few rows, `runtime.linear.cpu_products` for many.

Axes in names: see `runtime.linear.packed`; those of packed INT4 are B blocks of outputs, U lower or upper four bits, H
outputs of half a block, N outputs of half of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.linear import cpu_products
from trimtab.runtime.linear.packed import PackedLinear

#: Weights of a group that the kernel of INT4 takes.
_INT4_GROUPS = (32, 64, 128, 256)


Multiply = Callable[[torch.Tensor], torch.Tensor]

#: Rows up to which a packed kernel with vector code is faster than the dense product, by the type that is multiplied
#: fast here: INT4 takes longer to unpack.
_PACKED_ROWS: dict[str, dict[torch.dtype, int]] = {
    "_weight_int8pack_mm": {torch.bfloat16: 16, torch.float32: 16},
    "_weight_int4pack_mm_for_cpu": {torch.bfloat16: 32, torch.float32: 24},
}


def packed_rows(kernel: str, packed: Multiply, dense: Multiply, in_features: int) -> int:
    """Returns the rows up to which a packed kernel is the faster one, 0 where PyTorch has no vector code for it.

    Where it has, one row takes a third of the dense product's time; where it has none, six times as much. So a first
    layer is timed for each kernel, and no noise turns the answer round.
    """

    def is_fast() -> bool:
        x_RI = torch.ones(1, in_features, dtype=torch.bfloat16)
        return cpu_products.is_faster(lambda: packed(x_RI), lambda: dense(x_RI), rounds=3)

    if kernel not in _fast:
        with torch.inference_mode():
            _fast[kernel] = is_fast()
    return _PACKED_ROWS[kernel][cpu_products.dtype()] if _fast[kernel] else 0


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
        for bytes_BIH, here in _blocks(Int4WeightOnly.pack(layer), out_features):
            found_BHI = found_OI[here].view(len(bytes_BIH), -1, in_features)
            found_BHI.copy_(torch.cat([bytes_BIH & 15, bytes_BIH >> 4], dim=2).transpose(1, 2))
        return torch.equal(found_OI.to(torch.int8) - 8, layer_layout.numbers(layer))

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        x_RI = x_RI.contiguous()
        return torch._weight_int4pack_mm_for_cpu(x_RI, self.weight, self.group_size, self.scale_zero_GO2)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        x_RI, rows = x_RI.to(cpu_products.dtype()), len(x_RI)
        y_RO = torch.empty(rows, self.out_features, dtype=torch.bfloat16)
        outputs, groups = self._tile(x_RI.dtype)
        for bytes_BIH, here in _blocks(self.weight, self.out_features):
            blocks, _, half = bytes_BIH.shape
            y_RUBH = y_RO[:, here].view(rows, blocks, 2, half).transpose(1, 2)
            scale_GUBH = self.scale_zero_GO2[:, here, 0].view(-1, blocks, 2, half).transpose(1, 2)
            count = max(1, outputs // (2 * half))
            for first in range(0, blocks, count):
                some = slice(first, first + count)
                y_RUBH[:, :, some] = self._product(x_RI, bytes_BIH[some], scale_GUBH[:, :, some], groups)
        return y_RO

    def _tile(self, kind: torch.dtype) -> tuple[int, int]:
        """Returns of how many outputs and of how many groups of inputs the numbers are unpacked at once.

        A product of bfloat16 rounds its output, so it has all inputs. Sums in float32 are added up, and a tile is four
        times as wide as long: in memory it has long rows, and sums of many rows are read and written for few tiles.
        """
        if kind == torch.bfloat16:
            length = cpu_products.tile_length(self.out_features, self.in_features, cpu_products.LARGEST)
            return length, self.in_features // self.group_size
        size = cpu_products.TILE * torch.get_num_threads()
        outputs = min(2 * math.isqrt(size), self.out_features)
        groups, most = self.in_features // self.group_size, max(1, size // outputs // self.group_size)
        return outputs, -(-groups // -(-groups // most))  # all of a size, if they can be

    def _product(
        self, x_RI: torch.Tensor, bytes_BIH: torch.Tensor, scale_GUBH: torch.Tensor, groups: int
    ) -> torch.Tensor:
        """Returns the product of rows and some blocks, [R, U, B, H] in the type of the rows.

        A weight is (q - 8) * scale, which float32 holds and bfloat16 rounds.
        """
        kind, outputs = x_RI.dtype, scale_GUBH[0].numel()
        scale_G1O = cpu_products.scratch("scale", kind, *scale_GUBH.shape).copy_(scale_GUBH).view(-1, 1, outputs)
        offset_G1O = scale_G1O * -8
        sums_RO = torch.empty(x_RI.shape[0], outputs, dtype=kind)
        tiles = _numbers(bytes_BIH, groups * self.group_size, kind)
        for group, (here, w_IO) in zip(range(0, scale_G1O.shape[0], groups), tiles, strict=True):
            some, w_GSO = slice(group, group + groups), w_IO.view(-1, self.group_size, outputs)
            torch.addcmul(offset_G1O[some], w_GSO, scale_G1O[some], out=w_GSO)
            sums_RO.addmm_(x_RI[:, here], w_IO, beta=min(1, group))  # the first ignores what was there
        return sums_RO.view(-1, *scale_GUBH.shape[1:])


def _blocks(packed: torch.Tensor, out_features: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yields the kernel's layout as bytes [B, I, H], and of which outputs they are.

    A block has 2 * H outputs: its bytes hold the first half of them in their lower four bits, the second in the upper.
    Of the last outputs, which are neighbours, two are a block.
    """
    block, data = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32, packed.reshape(-1)
    columns = len(data) * 2 // out_features
    whole = out_features // block * block
    if whole:
        yield data[: whole * columns // 2].view(-1, columns, block // 2), slice(whole)
    if whole < out_features:
        yield data[whole * columns // 2 :].view(columns, -1).t()[..., None], slice(whole, None)


def _numbers(bytes_BIH: torch.Tensor, step: int, kind: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the numbers from 0 to 15 of some blocks, [I, U B H] of a type, and of which inputs: so many at a time.

    Nothing is moved but bytes in runs of 16 or 32; the other passes are over long rows.
    """
    blocks, columns, half = bytes_BIH.shape
    step = min(step, columns)
    # Where there are 16 bytes together, these are moved as one number.
    as_moved = torch.complex128 if half % 16 == 0 else torch.uint8
    from_IBH = bytes_BIH.view(as_moved).transpose(0, 1)
    bytes_IN = cpu_products.scratch("bytes", torch.uint8, step, blocks * half)
    moved_IBH = bytes_IN.view(as_moved).view(step, blocks, -1)
    numbers_IUN = cpu_products.scratch("numbers", torch.int8, step, 2, blocks * half)  # signed is converted faster
    lower_IN, upper_IN = numbers_IUN.view(torch.uint8).unbind(1)
    tile_IUN = cpu_products.scratch("tile", kind, step, 2, blocks * half)
    buffers = moved_IBH, bytes_IN, lower_IN, upper_IN, numbers_IUN, tile_IUN, tile_IUN.view(step, -1)
    for start in range(0, columns, step):
        if start + step > columns:
            buffers = tuple(buffer[: columns - start] for buffer in buffers)
        moved_IBH, bytes_IN, lower_IN, upper_IN, numbers_IUN, tile_IUN, tile_IO = buffers
        here = slice(start, start + step)
        moved_IBH.copy_(from_IBH[here])
        torch.bitwise_and(bytes_IN, 15, out=lower_IN)
        torch.bitwise_right_shift(bytes_IN, 4, out=upper_IN)
        tile_IUN.copy_(numbers_IUN)
        yield here, tile_IO
