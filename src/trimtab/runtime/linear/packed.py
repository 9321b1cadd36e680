"""What a linear layer over a packed weight is, and the one that runs any format anywhere.

Axes in names: R rows (tokens), I in_features, O out_features, G groups of a row. `x_RI @ w_OI.T -> y_RO`.

A packed kernel reads few bytes and wins where the weight is the traffic: few rows, as in decoding. With many
rows the dense product wins even though it must unpack the weight first; `packed_rows` is the crossover. The
packed weight is the only copy kept: the unpacked one lives for one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.catalog.formats import Inputs
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.linear import cpu_products
from trimtab.runtime.rounding import inputs


class PackedLinear(nn.Module):
    """A linear layer over a packed weight, bfloat16 in and out.

    `kernel` names the product that few rows use. `emulated` is True where that is no low-precision kernel:
    the numbers are the format's, the speed is not.
    """

    kernel = ""
    #: What it multiplies, as `Storage.product` tells them apart: numbers, which share a scale, how inputs are rounded.
    products: tuple[tuple[str, str, Inputs | None], ...] = ()
    emulated = False
    packed_rows = 0

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.keep(bias=None if bias is None else bias.bfloat16())
        scale = layer.pre_quant_scale if layer.scales_inputs else None
        self.keep(pre_quant_scale=None if scale is None else scale.reshape(-1).bfloat16())

    @classmethod
    def runs(cls, layer: Quantized) -> bool:
        """Whether there is a kernel here for the layer's product and its shape."""
        storage = layer.layout.storage
        return storage.has_plain_scales and storage.product in cls.products and cls.fits(layer)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the kernel takes the layer's shape: here, sides that are multiples of 16."""
        return not any(size % 16 for size in layer.shape)

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
        # Rows that lie in memory as they do behind a model's own layer, whose features some read as complex numbers.
        return y_RO.contiguous().reshape(*x.shape[:-1], self.out_features)

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The product on the packed weight."""
        raise NotImplementedError

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The product on the weight unpacked to bfloat16."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kernel}{', emulated' * self.emulated}"


class Emulated(PackedLinear):
    """Any format without a kernel on this device: activations rounded as it says, the weight unpacked.

    A GPU unpacks it each time, where memory is what is short; there FP8 and FP4 numbers times their scales do not all
    fit bfloat16, so the unpacked weight is rounded once more, and so are inputs. On a CPU that would take up to twenty
    times the product itself, so it is unpacked once: to the numbers that `layer_layout.factors` says bfloat16 holds, as
    large as the baseline that the same machine runs. Inputs are numbers that it holds too, found in a table of 128 KiB
    for each layer where their scale is static, and all scales multiply the output: the products are those of the format
    up to the order of sums.
    """

    kernel = "dequantize + mm"
    emulated = True

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        self.layout = layer.layout
        self.keep(unpacked=None, scale=None, table=None)
        self.keep(input_scale=None if layer.input_scale is None else layer.input_scale.float().reshape(()))
        if layer.weight.device.type == "cpu":
            unpacked, scale = layer_layout.factors(layer)
            self.unpacked = cpu_products.laid_out(unpacked)
            self.scale = scale.reshape(()) if scale.numel() == 1 else scale
            if self.input_scale is not None:
                self.scale = self.scale * self.input_scale
                self.table = inputs.look_up_table(self.layout.storage.inputs, self.input_scale)
        else:
            self.keep(weight=layer.weight, weight_scale=layer.weight_scale, weight_scale_2=layer.weight_scale_2)

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        rounding = self.layout.storage.inputs
        if self.unpacked is None:
            layer = Quantized(self.layout, self.weight, self.weight_scale, weight_scale_2=self.weight_scale_2)
            x_RI = inputs.rounded(rounding, x_RI, self.input_scale).bfloat16()
            return F.linear(x_RI, layer_layout.scaled_weight(layer).bfloat16())
        if rounding is None:
            return cpu_products.scaled(x_RI, self.unpacked, self.scale)
        kind = cpu_products.dtype()
        numbers_RI, scale = inputs.in_units(rounding, x_RI, self.input_scale, self.table, kind)
        found = () if self.input_scale is not None else (scale,)
        return cpu_products.scaled(numbers_RI, self.unpacked, self.scale, *found)
