"""Layers on a CUDA GPU: FP8 by PyTorch's kernels, weight-only ones by Triton's.

Axes in names: see `runtime.linear.packed`; W words of a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from trimtab.catalog.formats import Inputs
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.kernels import tile, words
from trimtab.runtime.kernels.tile import Tile
from trimtab.runtime.linear import elementwise
from trimtab.runtime.linear.packed import PackedLinear
from trimtab.runtime.rounding.inputs import token_scales


class WeightOnly(PackedLinear):
    """Weights of few bits in words: few rows are multiplied by `runtime.kernels.matmul`, many with a dense weight."""

    packed_rows = 64
    products = (("int8", "row", None), ("int4", "group", None), ("e2m1", "block", None))

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.bits, self.group_size = layer.layout.bits, layer.layout.group_size
        self.floats = layer.layout.storage.numbers == "e2m1"
        self.kernel = f"{layer.layout.storage.numbers} in words, Triton"
        #: What a tile must divide: of E2M1 it may have several groups, for they are short.
        self.undivided = 0 if self.floats else self.group_size
        scale = layer_layout.group_scales(layer) if self.group_size else layer.weight_scale.float()
        codes = layer_layout.codes_e2m1(layer.weight) if self.floats else layer_layout.numbers(layer)
        self.keep(words_OW=words.pack(codes, self.bits))
        self.keep(scale=scale.t().contiguous() if self.group_size else scale.reshape(-1))
        self._few, self._many = (
            self.by(tile.usual(*self.words_OW.shape, self.undivided, few)) for few in (True, False)
        )

    @classmethod
    def runs(cls, layer: Quantized) -> bool:
        """Whether there is a kernel here for the layer's product and its shape, however its scales are stored."""
        return layer.layout.storage.product in cls.products and cls.fits(layer)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the kernel has tiles for the layer, and Triton is there."""
        rows, columns = layer.shape
        words_of_row = columns * layer.layout.bits // words.WORD
        sixteenths = not any(size % 16 for size in (rows, words_of_row, layer.layout.group_size))
        return sixteenths and importlib.util.find_spec("triton") is not None

    def by(self, cut: Tile) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns the product of few rows in a tile.

        Raises:
            ValueError: the tile does not divide the layer.
        """
        from trimtab.runtime.kernels import matmul

        return matmul.Matmul(self.words_OW, self.scale, cut, self.bits, self.group_size, self.floats)

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._few(x_RI) if len(x_RI) <= tile.FEW else self._many(x_RI)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        from trimtab.runtime.kernels import matmul

        if self.group_size:
            return F.linear(x_RI, matmul.widen(self.words_OW, self.bits, self.scale, self.group_size, self.floats))
        return F.linear(x_RI, matmul.widen(self.words_OW, self.bits)) * self.scale.bfloat16()


class Fp8(PackedLinear):
    """FP8 (e4m3) weights and activations, one scale each, on a GPU of compute capability 8.9 or later.

    Where `fused.join` gave every row of the weight a scale, the kernel wants one for every token too.
    """

    kernel = "_scaled_mm"
    products = (("e4m3", "tensor", Inputs("e4m3")),)

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        scale = layer.weight_scale.float()
        self.by_row = scale.numel() > 1
        self.keep(weight_OI=layer.weight, weight_scale=scale.reshape((1, -1) if self.by_row else ()))
        self.keep(input_scale=layer.input_scale.float().reshape(()))
        self.keep(to_codes_1=1 / layer.input_scale.float().reshape(1))
        self._to_e4m3 = elementwise.rounding("to_e4m3", layer.weight.device)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the GPU multiplies FP8, and the layer's sides are multiples of 16."""
        return _multiplies_fp8(layer)

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
    products = (("e4m3", "row", Inputs("e4m3", "token")),)

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.keep(weight_OI=layer.weight, scale_1O=layer.weight_scale.float().reshape(1, -1))

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """As of `Fp8`."""
        return _multiplies_fp8(layer)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        scale_R1 = token_scales(x_RI)
        codes_RI = (x_RI / scale_R1).to(torch.float8_e4m3fn)
        scales = {"scale_a": scale_R1, "scale_b": self.scale_1O}
        return torch._scaled_mm(codes_RI, self.weight_OI.t(), out_dtype=torch.bfloat16, **scales)


def _multiplies_fp8(layer: Quantized) -> bool:
    return PackedLinear.fits(layer) and torch.cuda.get_device_capability(layer.weight.device) >= (8, 9)
