"""Weight-only layers on a CPU, by PyTorch's kernels. Axes in names: see `runtime.packed_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.runtime import formats
from trimtab.runtime.formats import Quantized
from trimtab.runtime.packed_linear import PackedLinear

#: Weights of a group that the kernel of INT4 takes.
_INT4_GROUPS = (32, 64, 128, 256)


class Int8WeightOnly(PackedLinear):
    """INT8 weights with a scale for each output channel, rounded to the bfloat16 of the activations."""

    kernel = "_weight_int8pack_mm"
    products = (("int8", "row", None),)
    packed_rows = 16

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether every row begins at a multiple of 16 bytes: the kernel crashes the process on others."""
        return layer.shape[1] % 16 == 0 and layer.weight.data_ptr() % 16 == 0

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.keep(weight_OI=layer.weight, scale_O=layer.weight_scale.reshape(-1).bfloat16())

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x_RI.contiguous(), self.weight_OI, self.scale_O)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_RI, self.weight_OI.bfloat16()) * self.scale_O


class Int4WeightOnly(PackedLinear):
    """INT4 weights with a scale for each group of a row, in the layout of PyTorch's CPU kernel.

    That layout is private to PyTorch (ATen/native/cpu/int4mm_kernel.cpp): rows stand in blocks of 64 with
    AVX-512, 32 with AVX2; in a whole block the two nibbles of a byte are half a block apart, in the last,
    smaller one they are neighbours. `fits` packs and unpacks the layer to see that this still holds.
    """

    kernel = "_weight_int4pack_mm_for_cpu"
    products = (("int4", "group", None),)
    packed_rows = 128

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.group_size = layer.layout.group_size
        scale_GO = layer.weight_scale.bfloat16().t()
        # The kernel computes (q - 8) * scale + zero.
        scale_zero_GO2 = torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1).contiguous()
        self.keep(weight=self.pack(layer), scale_zero_GO2=scale_zero_GO2)

    @staticmethod
    def pack(layer: Quantized) -> torch.Tensor:
        """Returns the layer's numbers in the kernel's layout."""
        nibbles_OI = formats.numbers(layer).to(torch.int32) + 8
        return torch._convert_weight_to_int4pack_for_cpu(nibbles_OI, 1)  # the second argument is unused on CPUs

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the kernel takes this shape and its layout is the known one."""
        out_features, in_features = layer.shape
        if out_features % 16 or in_features % 2 or layer.layout.group_size not in _INT4_GROUPS:
            return False
        unpacked_IO = _unpack_from_cpu(Int4WeightOnly.pack(layer), out_features, in_features, torch.uint8)
        return torch.equal(unpacked_IO.t().to(torch.int8) - 8, formats.numbers(layer))

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        x_RI = x_RI.contiguous()
        return torch._weight_int4pack_mm_for_cpu(x_RI, self.weight, self.group_size, self.scale_zero_GO2)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        w_IO = _unpack_from_cpu(self.weight, self.out_features, self.in_features, torch.bfloat16)
        grouped = w_IO.view(-1, self.group_size, self.out_features)
        grouped.sub_(8).mul_(self.scale_zero_GO2[:, None, :, 0])
        return x_RI @ w_IO


def _unpack_from_cpu(packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the nibbles 0 to 15 of the kernel's layout, [in, out]."""
    block = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    whole = rows // block * block
    data = packed.reshape(-1)
    nibbles_IO = torch.empty(columns, rows, dtype=dtype)
    halves = nibbles_IO[:, :whole].view(columns, whole // block, 2, block // 2)
    blocks = data[: whole * columns // 2].view(whole // block, columns, block // 2).permute(1, 0, 2)
    halves[:, :, 0], halves[:, :, 1] = blocks & 15, blocks >> 4
    rest = data[whole * columns // 2 :].view(columns, (rows - whole) // 2)
    nibbles_IO[:, whole::2], nibbles_IO[:, whole + 1 :: 2] = rest & 15, rest >> 4
    return nibbles_IO
