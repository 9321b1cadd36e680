"""Which packed linear layer runs a format on a device; on any device, INT8 weights and activations.

Axes in names: see `runtime.linear.packed`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.catalog.formats import Inputs
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.kernels import tile
from trimtab.runtime.linear import cpu, cpu_products, elementwise
from trimtab.runtime.linear.cpu import Int4WeightOnly, Int8WeightOnly
from trimtab.runtime.linear.cuda import Fp8, Fp8PerToken, WeightOnly
from trimtab.runtime.linear.packed import Emulated, PackedLinear


class Int8Static(PackedLinear):
    """INT8 weights and activations (SmoothQuant): one scale for all activations, measured in calibration.

    On processors that multiply bytes by AVX2 alone, oneDNN adds pairs of products in 16 bits, where they saturate (of
    random numbers the sums are 18 % off), or PyTorch has nothing but a slow loop. There the product of the same whole
    numbers is computed in float32, whose sums are exact up to 2^24 and rounded to 24 bits beyond; of few rows by the
    kernel of weight-only layers, which sums in float32 too and rounds to bfloat16.
    """

    kernel = "_int_mm"
    products = (("int8", "row", Inputs("int8")),)

    def __init__(self, layer: Quantized, bias: torch.Tensor | None):
        super().__init__(layer, bias)
        input_scale = layer.input_scale.float().reshape(1)  # an axis, unlike a scalar, makes the product float32
        to_integers = 1 / input_scale
        if layer.pre_quant_scale is not None:  # one multiplication in float32 instead of two in bfloat16
            to_integers = layer.pre_quant_scale.float().reshape(-1) * to_integers
        self.keep(pre_quant_scale=None, to_integers=to_integers, weight_OI=layer.weight)
        self.keep(scale_O=layer.weight_scale.float().reshape(-1) * input_scale)
        self.kernel = self.name_on(layer.weight.device)
        self._to_int8 = elementwise.rounding("to_int8", layer.weight.device)
        if self.kernel != Int8Static.kernel and Int8WeightOnly.fits(layer):
            self.keep(ones_O=torch.ones(self.out_features, dtype=torch.bfloat16))
            packed = (Int8WeightOnly.kernel, self.packed, self.dense)
            self.packed_rows = cpu.packed_rows(*packed, self.in_features)

    @staticmethod
    def fits(layer: Quantized) -> bool:
        """Whether the device takes the shape: a CPU takes any, a GPU multiples of 16."""
        return layer.weight.device.type == "cpu" or PackedLinear.fits(layer)

    @staticmethod
    def name_on(device: torch.device) -> str:
        """Returns what multiplies on a device."""
        multiplies = device.type != "cpu" or cpu_products.multiplies_integers()
        return Int8Static.kernel if multiplies else "float32 products of INT8"

    def codes(self, x_RI: torch.Tensor) -> torch.Tensor:
        """The activations in units of their scale, as whole numbers."""
        return self._to_int8(x_RI, self.to_integers)

    def packed(self, x_RI: torch.Tensor) -> torch.Tensor:
        q_RI = self.codes(x_RI).bfloat16().contiguous()  # which holds them all
        return (torch._weight_int8pack_mm(q_RI, self.weight_OI, self.ones_O) * self.scale_O).bfloat16()

    def dense(self, x_RI: torch.Tensor) -> torch.Tensor:
        q_RI, rows = self.codes(x_RI), len(x_RI)
        if self.kernel != Int8Static.kernel:
            return cpu_products.exact(q_RI, self.weight_OI).mul_(self.scale_O).bfloat16()
        if q_RI.is_cuda and rows <= 16:  # cuBLAS refuses fewer
            q_RI = F.pad(q_RI, (0, 0, 0, 32 - rows))
        return (torch._int_mm(q_RI, self.weight_OI.t())[:rows] * self.scale_O).bfloat16()


def build(layer: Quantized, bias: torch.Tensor | None, device: torch.device) -> PackedLinear:
    """Returns the module that runs a layer on a device: its kernel where there is one, else emulated."""
    layer = layer.to(device)
    bias = None if bias is None else bias.to(device)
    kind = _choose(layer, device)
    module = kind(layer, bias)
    if kind is Emulated or device.type != "cuda":
        return module
    return _tried(module, layer)


#: The kernels of each kind of device; any other format is emulated there.
KERNELS: dict[str, tuple[type[PackedLinear], ...]] = {
    "cpu": (Int8Static, Int8WeightOnly, Int4WeightOnly),
    "cuda": (Int8Static, Fp8, Fp8PerToken, WeightOnly),
}


def _choose(layer: Quantized, device: torch.device) -> type[PackedLinear]:
    return next((kind for kind in KERNELS.get(device.type, ()) if kind.runs(layer)), Emulated)


@torch.inference_mode()
def _tried(module: PackedLinear, layer: Quantized) -> PackedLinear:
    """Returns the module, for the rows that its packed kernel takes here, or the one that emulates it.

    Which kernels a GPU has depends on the card, PyTorch's version and how it was built, and no list of it is kept.
    """
    emulated = Emulated(layer, module.bias)
    x_RI = _trial(layer, max(1, module.packed_rows))
    expected_RO = emulated(x_RI)
    if not _runs(module, x_RI[:1], expected_RO[:1]):
        return emulated
    if module.packed_rows > tile.FEW and not _runs(module, x_RI, expected_RO):
        module.packed_rows = tile.FEW  # more of them do not fit into the shared memory of every card
    return module


def _trial(layer: Quantized, rows: int) -> torch.Tensor:
    """Returns inputs of a layer, bfloat16 [R, I], always the same."""
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(rows, layer.shape[1], generator=generator).to(layer.weight.device)
    if layer.input_scale is not None:
        x_RI *= 32 * layer.input_scale.float().reshape(1)  # within the range of INT8, and of FP8
    if layer.pre_quant_scale is not None:
        x_RI /= layer.pre_quant_scale.float().reshape(-1)
    return x_RI.bfloat16()


def _runs(module: PackedLinear, x_RI: torch.Tensor, expected_RO: torch.Tensor) -> bool:
    """Whether a layer's kernel for so many rows runs here and computes its product."""
    try:
        found = module(x_RI).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a library or a compiler says about a card
        return False
    expected = expected_RO.float()
    return bool((found - expected).norm() <= 0.05 * expected.norm())
