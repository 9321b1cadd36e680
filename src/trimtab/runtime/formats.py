"""How ModelOpt's unified checkpoints lay a quantized layer out, and what float weight it stands for.

| quant_algo | recipe | weight | weight_scale | input_scale |
|---|---|---|---|---|
| W8A16 | int8_wo | int8 [out, in] | [out] | - |
| W8A8_SQ_PER_CHANNEL | int8_sq | int8 [out, in] | [out] | scalar |
| FP8 | fp8 | float8_e4m3fn [out, in] | scalar | scalar |
| W4A16_AWQ | int4_awq, int4_rtn | uint8 [out / 2, in] | [out, in / group_size] | - |

A byte of INT4 holds two output channels: the low nibble is row 2r, the high nibble row 2r + 1, both in two's
complement. `pre_quant_scale` [in], where it is stored, multiplies the layer's input; where ModelOpt folded it
into the layer norm before it, it is absent. Source: modelopt/torch/export/quant_utils.py, 0.47.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.errors import Failure

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max

#: The type of the stored weight, and whether activations are quantized, by quant_algo.
STORED = {
    "W8A16": (torch.int8, False),
    "W8A8_SQ_PER_CHANNEL": (torch.int8, True),
    "FP8": (torch.float8_e4m3fn, True),
    "W4A16_AWQ": (torch.uint8, False),
}


@dataclass(frozen=True)
class Layout:
    """How one layer is quantized: ModelOpt's `quant_algo`, and the weights that share a scale (INT4; else 0)."""

    algo: str
    group_size: int = 0


@dataclass(frozen=True)
class Quantized:
    """The stored tensors of one layer; shapes as in the table above."""

    layout: Layout
    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.weight.shape
        return (2 * rows if self.layout.algo == "W4A16_AWQ" else rows), columns

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales, as stored."""
        parts = (self.weight, self.weight_scale, self.input_scale, self.pre_quant_scale)
        return sum(part.nbytes for part in parts if part is not None)


def check(name: str, layer: Quantized) -> None:
    """Checks types, shapes and scales.

    Raises:
        Failure: `export_damaged`; the reason names the layer, the tensor and what is wrong with it.
    """
    dtype, static_input = STORED[layer.layout.algo]
    if layer.weight.dtype != dtype or layer.weight.dim() != 2:
        found = f"{layer.weight.dtype} {list(layer.weight.shape)}"
        raise _damaged(name, f"its weight is {found}, where {layer.layout.algo} stores a {dtype} matrix")
    out_features, in_features = layer.shape
    group = layer.layout.group_size
    if layer.layout.algo == "W4A16_AWQ":
        if group <= 0 or in_features % group:
            raise _damaged(name, f"group_size {group} does not divide its {in_features} inputs")
        scale_shape = (out_features, in_features // group)
    else:
        scale_shape = () if layer.layout.algo == "FP8" else (out_features,)
    _check_scale(name, "weight_scale", layer.weight_scale, scale_shape)
    if static_input:
        _check_scale(name, "input_scale", layer.input_scale, ())
    if layer.pre_quant_scale is not None:
        _check_scale(name, "pre_quant_scale", layer.pre_quant_scale, (in_features,))


def _check_scale(name: str, what: str, scale: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if scale is None:
        raise _damaged(name, f"its {what} is missing")
    if tuple(n for n in scale.shape if n != 1) != tuple(n for n in shape if n != 1):
        raise _damaged(name, f"its {what} has shape {list(scale.shape)}, expected {list(shape)}")
    if not torch.isfinite(scale).all() or not (scale > 0).all():
        raise _damaged(name, f"its {what} has values that are not finite and positive")


def _damaged(name: str, what: str) -> Failure:
    return Failure("export_damaged", f"{name}: {what}")


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Returns the signed values of packed INT4: uint8 [out / 2, in] -> int8 [out, in], from -8 to 7."""
    low, high = packed & 15, packed >> 4
    nibbles = torch.stack([low, high], dim=1).reshape(2 * packed.shape[0], packed.shape[1])
    return (nibbles ^ 8).to(torch.int8) - 8  # the sign bit of two's complement


def dequantize(layer: Quantized) -> torch.Tensor:
    """Returns the float32 weight [out, in] that the layer applies to its unscaled input.

    `pre_quant_scale` is multiplied in, so the result compares with the original weight, up to what was folded
    into layer norms.
    """
    weight = integers(layer).float()
    scale = layer.weight_scale.float()
    if layer.layout.algo == "W4A16_AWQ":
        weight = weight * scale.reshape(weight.shape[0], -1).repeat_interleave(layer.layout.group_size, dim=1)
    else:
        weight = weight * scale.reshape(-1, 1)
    return weight if layer.pre_quant_scale is None else weight * layer.pre_quant_scale.float().reshape(1, -1)


def integers(layer: Quantized) -> torch.Tensor:
    """Returns the stored numbers before scaling: int8 or float8_e4m3fn [out, in]."""
    return unpack_int4(layer.weight) if layer.layout.algo == "W4A16_AWQ" else layer.weight
