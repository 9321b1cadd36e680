"""Linear layers that keep their weight packed and multiply with PyTorch's low-precision kernels.

Axes in names: R rows (tokens), I in_features, O out_features, G groups of a row. `x_RI @ w_OI.T -> y_RO`.

A packed kernel reads few bytes and wins where the weight is the traffic: few rows, as in decoding. With many
rows the dense product wins even though it must unpack the weight first; `packed_rows` is the crossover. The
packed weight is the only copy kept: the unpacked one lives for one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.runtime import formats, small_kernels
from trimtab.runtime.formats import E4M3_MAX, Quantized


class PackedLinear(nn.Module):
    """A linear layer over a packed weight, bfloat16 in and out.

    `kernel` names the product that few rows use. `emulated` is True where that is no low-precision kernel:
    the numbers are the format's, the speed is not.
    """

    kernel = ""
    emulated = False
    packed_rows = 0

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.keep(bias=None if bias is None else bias.bfloat16())
        scale = layer.pre_quant_scale
        self.keep(pre_quant_scale=None if scale is None else scale.reshape(-1).bfloat16())

    def keep(self, **tensors: torch.Tensor | None) -> None:
        """Registers buffers that move with the module and are no part of its state dict."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_RI = x.reshape(-1, self.in_features)
        if self.pre_quant_scale is not None:
            x_RI = x_RI * self.pre_quant_scale
        y_RO = self.packed(x_RI) if len(x_RI) <= self.packed_rows else self.dense(x_RI)
        if self.bias is not None:
            y_RO = y_RO + self.bias
        return y_RO.reshape(*x.shape[:-1], self.out_features)

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The product on the packed weight."""
        raise NotImplementedError

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The product on the weight unpacked to bfloat16."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kernel}{', emulated' * self.emulated}"


class Int8WeightOnly(PackedLinear):
    """INT8 weights with a scale for each output channel, rounded to the bfloat16 of the activations."""

    kernel = "_weight_int8pack_mm"
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


class Int8WeightOnlyCuda(Int8WeightOnly):
    """INT8 weights widened for a dense product: on an H100 `_weight_int8pack_mm` took 156 µs for one row of a
    4096 x 4096 layer, and 2,403 µs for 64, where this takes 62 and 63, and bfloat16 17 and 16."""

    kernel = "int8 to bfloat16 + mm"
    emulated = True
    packed_rows = 0

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Any shape."""
        return True


#: Weights of a group that both kernels of INT4 take.
_INT4_GROUPS = (32, 64, 128, 256)


class Int4WeightOnly(PackedLinear):
    """INT4 weights with a scale for each group of a row, in the layout of PyTorch's CPU kernel.

    That layout is private to PyTorch (ATen/native/cpu/int4mm_kernel.cpp): rows stand in blocks of 64 with
    AVX-512, 32 with AVX2; in a whole block the two nibbles of a byte are half a block apart, in the last,
    smaller one they are neighbours. `fits` packs and unpacks the layer to see that this still holds.
    """

    kernel = "_weight_int4pack_mm_for_cpu"
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


class Int4WeightOnlyCuda(Int4WeightOnly):
    """The same on a GPU, in the layout of PyTorch's CUDA kernel, "tinygemm".

    That layout too is private to PyTorch (ATen/native/cuda/int4mm.cu): int32 [out / 8, in / 16 / tiles, 32, tiles / 2],
    where a thread of a warp holds, of one row, two neighbours at each eighth column, first all even, then all odd
    ones. `fits` packs and unpacks the layer to see that this still holds.
    """

    kernel = "_weight_int4pack_mm"
    #: The kernel reads and widens the weight once for each 16 rows; `benchmarks/gpu.py` prints where that loses.
    packed_rows = 128

    @staticmethod
    def pack(layer: Quantized) -> torch.Tensor:
        """Returns the layer's numbers in the kernel's layout."""
        nibbles_OI = (formats.numbers(layer) + 8).view(torch.uint8)
        in_features = nibbles_OI.shape[1]
        # Tiles of 16 columns that stand together: 8 make the widest load.
        tiles = next(n for n in (8, 4, 2) if in_features % (16 * n) == 0)
        return torch._convert_weight_to_int4pack(nibbles_OI[:, ::2] << 4 | nibbles_OI[:, 1::2], tiles)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the kernel takes this shape and its layout is the known one."""
        out_features, in_features = layer.shape
        if out_features % 8 or in_features % 32 or layer.layout.group_size not in _INT4_GROUPS:
            return False
        try:
            unpacked_OI = _unpack_from_cuda(Int4WeightOnlyCuda.pack(layer), torch.uint8)
        except RuntimeError:  # a build or a card without it
            return False
        return torch.equal(unpacked_OI.to(torch.int8) - 8, formats.numbers(layer))

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm(x_RI.contiguous(), self.weight, self.group_size, self.scale_zero_GO2)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        w_OI = _unpack_from_cuda(self.weight, torch.bfloat16)
        grouped = w_OI.view(self.out_features, -1, self.group_size)
        grouped.sub_(8).mul_(self.scale_zero_GO2[:, :, 0].t()[..., None])
        return F.linear(x_RI, w_OI)


def _unpack_from_cuda(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the nibbles 0 to 15 of the kernel's layout, [out, in].

    A word holds 8 of 32 columns: 8 * j + 2 * thread + odd, j = 2 * (byte % 2) + nibble, odd = byte // 2.
    """
    row_blocks, column_blocks, _, words = packed.shape
    data = packed.view(torch.uint8).view(row_blocks, column_blocks, 8, 4, words, 2, 2)
    data = data.permute(0, 2, 1, 4, 6, 3, 5)  # row block, row, column block, word, byte % 2, thread, odd
    nibbles = torch.empty(*data.shape[:5], 2, *data.shape[5:], dtype=dtype, device=packed.device)
    nibbles[..., 0, :, :], nibbles[..., 1, :, :] = data & 15, data >> 4
    return nibbles.view(8 * row_blocks, 32 * words * column_blocks)


class Int8Static(PackedLinear):
    """INT8 weights and activations (SmoothQuant): one scale for all activations, measured in calibration."""

    kernel = "_int_mm"

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        input_scale = layer.input_scale.float().reshape(1)  # an axis, unlike a scalar, makes the product float32
        to_integers = 1 / input_scale
        if layer.pre_quant_scale is not None:  # one multiplication in float32 instead of two in bfloat16
            to_integers = layer.pre_quant_scale.float().reshape(-1) * to_integers
        self.keep(pre_quant_scale=None, to_integers=to_integers, weight_OI=layer.weight)
        self.keep(scale_O=layer.weight_scale.float().reshape(-1) * input_scale)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        q_RI = (x_RI * self.to_integers).round_().clamp_(-128, 127).to(torch.int8)
        rows = len(q_RI)
        if q_RI.is_cuda and rows <= 16:  # cuBLAS refuses fewer
            q_RI = F.pad(q_RI, (0, 0, 0, 32 - rows))
        return (torch._int_mm(q_RI, self.weight_OI.t())[:rows] * self.scale_O).bfloat16()


class Fp8(PackedLinear):
    """FP8 (e4m3) weights and activations, one scale each, on a GPU of compute capability 8.9 or later.

    Where `fused.join` gave every row of the weight a scale, the kernel wants one for every token too.
    """

    kernel = "_scaled_mm"

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        scale = layer.weight_scale.float()
        self.by_row = scale.numel() > 1
        self.keep(weight_OI=layer.weight, weight_scale=scale.reshape((1, -1) if self.by_row else ()))
        self.keep(input_scale=layer.input_scale.float().reshape(()))
        self.keep(to_codes_1=1 / layer.input_scale.float().reshape(1))
        self._to_e4m3 = small_kernels.rounding(layer.weight.device)

    def codes(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The activations in units of their scale, as e4m3 numbers."""
        return self._to_e4m3(x_RI, self.to_codes_1)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        codes_RI = self.codes(x_RI)
        given = self.input_scale.expand(len(x_RI), 1).contiguous() if self.by_row else self.input_scale
        scales = {"scale_a": given, "scale_b": self.weight_scale}
        return torch._scaled_mm(codes_RI, self.weight_OI.t(), out_dtype=torch.bfloat16, **scales)


class Fp8PerToken(PackedLinear):
    """FP8 (e4m3), a scale for each output channel, and one for each token found when it passes."""

    kernel = "_scaled_mm, row-wise"

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.keep(weight_OI=layer.weight, scale_1O=layer.weight_scale.float().reshape(1, -1))

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        scale_R1 = token_scales(x_RI)
        codes_RI = (x_RI / scale_R1).to(torch.float8_e4m3fn)
        scales = {"scale_a": scale_R1, "scale_b": self.scale_1O}
        return torch._scaled_mm(codes_RI, self.weight_OI.t(), out_dtype=torch.bfloat16, **scales)


def token_scales(x_RI: torch.Tensor) -> torch.Tensor:
    """Returns for each row the scale that makes its largest value e4m3's largest, float32 [R, 1]."""
    largest_R1 = torch.linalg.vector_norm(x_RI, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest_R1.div_(E4M3_MAX).clamp_min_(1e-12)


class Emulated(PackedLinear):
    """Any format without a kernel on this device: activations rounded as it says, the weight unpacked each time.

    The products are those of the format up to the order of sums; FP8 and FP4 numbers times their scales do not
    all fit bfloat16, so the unpacked weight is rounded once more.
    """

    kernel = "dequantize + mm"
    emulated = True

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.layout = layer.layout
        self.keep(weight=layer.weight, weight_scale=layer.weight_scale, weight_scale_2=layer.weight_scale_2)
        self.keep(input_scale=None if layer.input_scale is None else layer.input_scale.float().reshape(()))

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        layer = Quantized(self.layout, self.weight, self.weight_scale, weight_scale_2=self.weight_scale_2)
        return F.linear(self.rounded(x_RI), formats.scaled_weight(layer).bfloat16())

    def rounded(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The activations as the format's product sees them."""
        kind = self.layout.storage.activations
        if not kind:
            return x_RI
        x_RI = x_RI.float()
        if kind == "fp8":
            x_RI = formats.round_fp8(x_RI, self.input_scale)
        elif kind == "fp8 per token":
            x_RI = formats.round_fp8(x_RI, token_scales(x_RI))
        elif kind == "nvfp4":
            x_RI = formats.round_nvfp4(x_RI, self.input_scale)
        elif kind == "int8":
            x_RI = formats.round_int8(x_RI, self.input_scale)
        return x_RI.bfloat16()


def build(layer: Quantized, bias: torch.Tensor | None, device: torch.device) -> PackedLinear:
    """Returns the module that runs a layer on a device: its kernel where there is one, else emulated."""
    layer = layer.to(device)
    bias = None if bias is None else bias.to(device)
    kind = _choose(layer, device)
    module = kind(layer, bias)
    if kind is not Emulated and device.type == "cuda" and not _runs(module, layer):
        return Emulated(layer, bias)
    return module


def _choose(layer: Quantized, device: torch.device) -> type[PackedLinear]:
    algo, on_cpu = layer.layout.algo, device.type == "cpu"
    sixteenths = not any(n % 16 for n in layer.shape)
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if algo == "FP8" and has_fp8 and sixteenths:
        return Fp8
    if algo == "FP8_PER_CHANNEL_PER_TOKEN" and has_fp8 and sixteenths:
        return Fp8PerToken
    if algo == "W8A8_SQ_PER_CHANNEL" and (on_cpu or sixteenths):
        return Int8Static
    weight_only = {
        "W8A16": Int8WeightOnly if on_cpu else Int8WeightOnlyCuda,
        "W4A16_AWQ": Int4WeightOnly if on_cpu else Int4WeightOnlyCuda,
    }.get(algo)
    return weight_only if weight_only and weight_only.fits(layer) else Emulated


@torch.inference_mode()
def _runs(module: PackedLinear, layer: Quantized) -> bool:
    """Whether a layer's kernel runs here and computes its product, tried on one row.

    Which kernels a GPU has depends on the card, PyTorch's version and how it was built, and no list of it is kept.
    """
    generator = torch.Generator().manual_seed(0)
    x_1I = torch.randn(1, module.in_features, generator=generator).to(layer.weight.device)
    if layer.input_scale is not None:
        x_1I *= 32 * layer.input_scale.float().reshape(1)  # within the range of INT8, and of FP8
    if layer.pre_quant_scale is not None:
        x_1I /= layer.pre_quant_scale.float().reshape(-1)
    x_1I = x_1I.bfloat16()
    emulated = Emulated(layer, module.bias)
    try:
        found = module(x_1I).float()
    except RuntimeError:
        return False
    expected = emulated(x_1I).float()
    return bool((found - expected).norm() <= 0.05 * expected.norm())
