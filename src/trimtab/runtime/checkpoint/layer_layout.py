"""How ModelOpt's unified checkpoints lay a quantized layer out, and what float weight it stands for.

| quant_algo | recipe | weight | weight_scale | weight_scale_2 | input_scale |
|---|---|---|---|---|---|
| W8A16 | int8_wo | int8 [out, in] | [out] | - | - |
| W8A8_SQ_PER_CHANNEL | int8_sq | int8 [out, in] | [out] | - | scalar |
| FP8 | fp8, fp8_gptq | e4m3 [out, in] | scalar | - | scalar |
| FP8_PER_CHANNEL_PER_TOKEN | fp8_per_channel | e4m3 [out, in] | [out] | - | - |
| W4A16_AWQ | int4_rtn, int4_awq, int4_gptq | INT4 [out / 2, in] | [out, in / group] | - | - |
| W4A8_AWQ | w4a8_awq | INT4 [out / 2, in] | [out, in / group] | scalar | scalar |
| NVFP4 | nvfp4 | E2M1 [out, in / 2] | e4m3 [out, in / 16] | scalar | scalar |
| W4A16_NVFP4 | nvfp4_wo | E2M1 [out, in / 2] | e4m3 [out, in / 16] | scalar | - |
| W4A8_MXFP4_FP8 | mxfp4 | E2M1 [out, in / 2] | E8M0 [out, in / 32] | - | scalar |
| W4A16_MXFP4 | mxfp4_wo | E2M1 [out, in / 2] | E8M0 [out, in / 32] | - | - |

A byte of INT4 holds two output channels: the low nibble is row 2r, the high nibble row 2r + 1, both in two's
complement. A byte of E2M1 holds two inputs of one channel, the even one in the low nibble; E8M0 is a power of
two, stored as its exponent plus 127. `weight_scale_2` multiplies NVFP4's block scales; in W4A8_AWQ it is the
scale at which the INT4 weights are rounded to FP8 for the product. `pre_quant_scale` [in], where it is stored,
multiplies the layer's input; where it was folded into the norm or the layer before it, it is absent. TensorRT-LLM
wants one for W4A16_AWQ where no norm stands before a layer, so int4_rtn has ones there.
Source: modelopt/torch/export/quant_utils.py, 0.47.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS, STORAGES, Storage
from trimtab.families import Family
from trimtab.model.facts import ModelFacts
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.few_bits import round_to, to_fp8

#: The type of a stored weight, by the type of its numbers: where two share a byte, that of the bytes.
_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8}
#: The tensors of a layer beside its weight.
SCALES = ("weight_scale", "input_scale", "pre_quant_scale", "weight_scale_2")


@dataclass(frozen=True)
class Layout:
    """How one layer is quantized: ModelOpt's `quant_algo`, and the weights of a row that share a scale (or 0)."""

    algo: str
    group_size: int = 0

    @property
    def storage(self) -> Storage:
        return STORAGES[self.algo]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored weight."""
        return _DTYPES[self.storage.numbers]

    @property
    def bits(self) -> int:
        """Bits of a weight, without its scales."""
        return self.storage.bits

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales that a layer must have; `pre_quant_scale` is the one that it may have besides."""
        inputs = self.storage.inputs
        second = ("weight_scale_2",) if self.storage.second_scale else ()
        given = ("input_scale",) if inputs and inputs.scale == "static" else ()
        return ("weight_scale", *second, *given)


@dataclass(frozen=True)
class Quantized:
    """The stored tensors of one layer; shapes as in the table above."""

    layout: Layout
    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    weight_scale_2: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.weight.shape
        packed = self.layout.storage.number.packed
        return (2 * rows if packed == "out" else rows), (2 * columns if packed == "in" else columns)

    @property
    def scales_inputs(self) -> bool:
        """Whether its `pre_quant_scale` changes anything: ones stand there for engines that ask for the tensor."""
        return self.pre_quant_scale is not None and not bool((self.pre_quant_scale == 1).all())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by the name that follows the layer's."""
        found = {name: getattr(self, name) for name in ("weight", *SCALES)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Quantized:
        """Returns the layer with its tensors on a device."""
        return Quantized(self.layout, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales, as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def layout_of(form: str, settings: Quantization) -> Layout:
    """Returns how a layer in a format that quantizes it is stored."""
    storage = FORMATS[form].storage
    return Layout(storage.algorithm, (storage.block or settings.group_size) if storage.in_groups else 0)


def plain_dtype(form: str) -> torch.dtype:
    """Returns the type of everything that a recipe's format does not quantize."""
    return getattr(torch, FORMATS[form].dtype)


def dtype_beside(family: Family, name: str, source: torch.dtype, plain: torch.dtype) -> torch.dtype:
    """Returns the type in which an export has a tensor that it does not quantize: the source's for what routers choose
    experts by and for what a recurrence decays by, where that is float32, and for whole numbers; else the format's."""
    kept = family.is_of_router(name) or family.is_of_state(name)
    return source if (kept and source == torch.float32) or not source.is_floating_point else plain


def mean_bits(facts: ModelFacts, layouts: Mapping[str, Layout], plain: Collection[str] = ()) -> float:
    """Returns the mean bits of the quantized weights, without their scales; 16 where nothing is quantized.

    Args:
        plain: layers that count with their 16 bits, where they have no layout.
    """
    sizes = {layer.name: layer.parameters for layer in facts.linears if layer.name in layouts or layer.name in plain}
    bits = sum((layouts[layer].bits if layer in layouts else 16) * size for layer, size in sizes.items())
    return bits / sum(sizes.values()) if sizes else 16.0


def check(name: str, layer: Quantized) -> None:
    """Checks types, shapes and scales.

    Raises:
        Failure: `export_damaged`; the reason names the layer, the tensor and what is wrong with it.
    """
    layout, storage = layer.layout, layer.layout.storage
    if layer.weight.dtype != layout.dtype or layer.weight.dim() != 2:
        found = f"{layer.weight.dtype} {list(layer.weight.shape)}"
        raise _damaged(name, f"its weight is {found}, where {layout.algo} stores a {layout.dtype} matrix")
    out_features, in_features = layer.shape
    if storage.in_groups:
        group = layout.group_size
        if group <= 0 or in_features % group or storage.block not in (0, group):
            raise _damaged(name, f"group_size {group} is not one for {layout.algo} and its {in_features} inputs")
        scale_shape = (out_features, in_features // group)
    else:
        scale_shape = () if storage.scale == "tensor" else (out_features,)
    for scale in layout.scales:
        _check_scale(name, scale, getattr(layer, scale), scale_shape if scale == "weight_scale" else ())
    if layer.pre_quant_scale is not None:
        _check_scale(name, "pre_quant_scale", layer.pre_quant_scale, (in_features,))


def _check_scale(name: str, what: str, scale: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if scale is None:
        raise _damaged(name, f"its {what} is missing")
    if tuple(n for n in scale.shape if n != 1) != tuple(n for n in shape if n != 1):
        raise _damaged(name, f"its {what} has shape {list(scale.shape)}, expected {list(shape)}")
    # Any E8M0 but 255, which stands for "not a number", is positive.
    good = scale < 255 if scale.dtype == torch.uint8 else torch.isfinite(scale.float()) & (scale.float() > 0)
    if not good.all():
        raise _damaged(name, f"its {what} has values that are not finite and positive")


def _damaged(name: str, what: str) -> Failure:
    return Failure("export_damaged", f"{name}: {what}")


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Returns the signed values of packed INT4: uint8 [out / 2, in] -> int8 [out, in], from -8 to 7."""
    low, high = packed & 15, packed >> 4
    nibbles = torch.stack([low, high], dim=1).reshape(2 * packed.shape[0], packed.shape[1])
    return (nibbles ^ 8).to(torch.int8) - 8  # the sign bit of two's complement


def pack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the packed bytes of signed values: int8 [out, in], from -8 to 7 -> uint8 [out / 2, in]."""
    low, high = numbers.view(-1, 2, numbers.shape[1]).unbind(1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Returns the values of packed E2M1: uint8 [out, in / 2] -> float32 [out, in], from -6 to 6."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return _e2m1(packed.device)[nibbles.int()]


def codes_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Returns the codes of packed E2M1, eight lower so that they are four bits with a sign: int8 [out, in]."""
    return (torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8)) - 8


def pack_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """Returns the packed bytes of E2M1 numbers: float32 [out, in], as `few_bits` rounds to -> uint8 [out, in / 2]."""
    size = numbers.abs()
    # From 1 on, the exponent and the first bit behind the point are the code, up to a constant.
    codes = ((size.view(torch.int32) >> 22) - 252).clamp_(min=0) + (size == 0.5) + 8 * (numbers < 0)
    low, high = codes.to(torch.uint8).view(len(numbers), -1, 2).unbind(-1)
    return low | high << 4


@cache
def _e2m1(device: torch.device) -> torch.Tensor:
    """The number of each code; kept, because a CUDA graph cannot record a copy to the GPU."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([positive, -positive]).to(device)


def numbers(layer: Quantized) -> torch.Tensor:
    """Returns the stored numbers before scaling, [out, in]: int8, float8_e4m3fn or float32."""
    unpack = {"out": unpack_int4, "in": unpack_e2m1}.get(layer.layout.storage.number.packed)
    return unpack(layer.weight) if unpack else layer.weight


def dequantize(layer: Quantized) -> torch.Tensor:
    """Returns the float32 weight [out, in] that the layer applies to its unscaled input.

    `pre_quant_scale` is multiplied in, so the result compares with the original weight, up to what was folded
    into layer norms.
    """
    weight = scaled_weight(layer)
    return weight if layer.pre_quant_scale is None else weight * layer.pre_quant_scale.float().reshape(1, -1)


def scaled_weight(layer: Quantized) -> torch.Tensor:
    """Returns the float32 weight [out, in] that the layer applies to an input times `pre_quant_scale`."""
    weight, layout, storage = numbers(layer).float(), layer.layout, layer.layout.storage
    scale = group_scales(layer)
    weight = _in_groups(weight, scale, layout.group_size) if storage.in_groups else weight * scale.reshape(-1, 1)
    if storage.second_scale == "rounded":
        return round_to(storage.inputs.numbers, weight, layer.weight_scale_2.float())
    return weight


def group_scales(layer: Quantized) -> torch.Tensor:
    """Returns what the stored numbers are multiplied by, float32, of the shape of `weight_scale`."""
    scale, storage = layer.weight_scale.float(), layer.layout.storage
    if storage.scale_type == "e8m0":
        scale = torch.exp2(scale - 127)
    return scale * layer.weight_scale_2.float() if storage.second_scale == "blocks" else scale


def factors(layer: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a bfloat16 matrix [out, in], and what its outputs are multiplied by, float32 [out] or [1]: the product of
    both is `scaled_weight`.

    The matrix is exact where a number has at most eight significant bits: INT8; e4m3, of four bits; E2M1, of two, times
    an e4m3 of its block, or a power of two. INT4 times a bfloat16 scale of its group is rounded.
    """
    storage, numbers_OI = layer.layout.storage, numbers(layer)
    if not storage.in_groups:
        return numbers_OI.bfloat16(), layer.weight_scale.float().reshape(-1)
    if not storage.second_scale:
        return scaled_weight(layer).bfloat16(), torch.ones(1, device=layer.weight.device)
    outer = layer.weight_scale_2.float().reshape(1)
    scaled_OI = _in_groups(numbers_OI.float(), layer.weight_scale.float(), layer.layout.group_size)
    # Weights that are rounded once more are e4m3 numbers in units of the second scale.
    return (to_fp8(scaled_OI, outer) if storage.second_scale == "rounded" else scaled_OI).bfloat16(), outer


def _in_groups(weight_OI: torch.Tensor, scale_OG: torch.Tensor, group_size: int) -> torch.Tensor:
    blocks = weight_OI.view(weight_OI.shape[0], -1, group_size)
    return (blocks * scale_OG.reshape(weight_OI.shape[0], -1, 1)).view_as(weight_OI)
