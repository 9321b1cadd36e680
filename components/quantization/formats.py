"""The recipe's formats: how the weights of layers that share an input become the tensors that ModelOpt's export holds.

The numbers are packed by ModelOpt's own functions; scales come from `scales`, `channels` and `gptq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

from trimtab.components.quantization import channels, gptq, scales
from trimtab.components.quantization.scales import FP8, INT4, INT8, Numbers
from trimtab.recipe import Quantization
from trimtab.runtime.formats import ALGORITHMS as STORED_AS
from trimtab.runtime.formats import E2M1_MAX, E4M3_MAX, Layout, Quantized

#: ModelOpt's own name of each quant_algo.
_MODELOPT = {
    "W8A16": "int8_wo",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4",
    "W4A8_MXFP4_FP8": "w4a8_mxfp4_fp8",
}
#: Of each format: the quant_algo it is stored as, and ModelOpt's name of that.
ALGORITHMS = {form: (algorithm, _MODELOPT[algorithm]) for form, algorithm in STORED_AS.items()}
_FIXED_GROUPS = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class Input:
    """What calibration measured of an input that layers share, float32: `amax` and `second_moment` [in], `gram`
    [in, in]; None where the format does without."""

    amax: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None
    gram: torch.Tensor | None = None

    def scaled(self, channel: torch.Tensor) -> Input:
        """Returns the statistics of the input divided by a channel scale, [in]."""
        return Input(
            None if self.amax is None else self.amax / channel,
            None if self.second_moment is None else self.second_moment / channel.square(),
            None if self.gram is None else self.gram / channel[:, None] / channel,
        )


def group_size(format: str, settings: Quantization) -> int:
    """Returns the weights of a row that share a scale, 0 where a row or a matrix does."""
    if format in _FIXED_GROUPS:
        return _FIXED_GROUPS[format]
    return settings.group_size if ALGORITHMS[format][0] in ("W4A16_AWQ", "W4A8_AWQ") else 0


def channel_scale(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> torch.Tensor | None:
    """Returns what the columns of the weights are multiplied by before rounding, float32 [in], or None."""
    if format in ("int4_awq", "int4_gptq", "w4a8_awq"):

        def rounded(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            blocks = weight.unflatten(1, (-1, settings.group_size))
            scale = scales.from_maximum(blocks, INT4)[..., None]
            return INT4.round(blocks / scale).mul_(scale).flatten(1)

        return channels.awq(list(weights.values()), seen.second_moment, rounded)
    if format == "int8_sq":
        return channels.smoothquant(list(weights.values()), seen.amax, seen.second_moment)[0]
    return None


def quantize(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    """Returns the stored tensors of layers that share an input, by layer.

    Args:
        format: a key of `ALGORITHMS`.
        weights: float32 [out, in] each, times the channel scale if there is one.
        seen: of the input, divided by the channel scale.
        settings: group_size, scales.
    """
    made = {"fp8": _fp8, "fp8_per_channel": _fp8_per_channel, "nvfp4": _nvfp4, "mxfp4": _mxfp4}.get(format)
    if made:
        return made(weights, seen, settings)
    if format.startswith("int8"):
        return {name: _int8(format, weight, seen, settings) for name, weight in weights.items()}
    return {name: _int4(format, weight, seen, settings) for name, weight in weights.items()}


def _scale(blocks: torch.Tensor, numbers: Numbers, importance: torch.Tensor | None) -> torch.Tensor:
    return scales.from_maximum(blocks, numbers) if importance is None else scales.searched(blocks, numbers, importance)


def _importance(format: str, seen: Input, settings: Quantization, groups: int | None = None) -> torch.Tensor | None:
    """What the error of a weight counts: the second moment of its input, or None for scales from the maximum."""
    if not settings.searches_scales(format):
        return None
    moment = seen.second_moment
    return moment if groups is None else moment.unflatten(0, (-1, groups))


def _static_input_scale(seen: Input, largest: float) -> torch.Tensor:
    return seen.amax.max().clamp_min(torch.finfo(torch.float32).tiny * 2**24) / largest


def _pack(format: str, weight: torch.Tensor, scale: torch.Tensor, **kept: torch.Tensor) -> Quantized:
    algorithm, name = ALGORITHMS[format]
    group = weight.shape[1] // scale.shape[1] if scale.dim() == 2 else 0
    packed = to_quantized_weight(weight, scale, name, kept.get("weight_scale_2"), group or None)
    stored = scale.bfloat16() if algorithm in ("W4A16_AWQ", "W4A8_AWQ") else scale
    return Quantized(Layout(algorithm, group), packed, stored, **kept)


def _int8(format: str, weight: torch.Tensor, seen: Input, settings: Quantization) -> Quantized:
    scale = _scale(weight, INT8, _importance(format, seen, settings))
    kept = {"input_scale": _static_input_scale(seen, INT8.largest)} if format == "int8_sq" else {}
    return _pack(format, weight, scale, **kept)


def _int4(format: str, weight: torch.Tensor, seen: Input, settings: Quantization) -> Quantized:
    size = settings.group_size
    scale = _scale(weight.unflatten(1, (-1, size)), INT4, _importance(format, seen, settings, size))
    if format == "int4_gptq":
        weight = gptq.round_weights(weight, seen.gram, scale.repeat_interleave(size, dim=1))
    kept = {}
    if format == "w4a8_awq":
        largest = (INT4.round(weight.unflatten(1, (-1, size)) / scale[..., None]).abs().amax(-1) * scale).max()
        kept = {"weight_scale_2": largest / E4M3_MAX, "input_scale": _static_input_scale(seen, E4M3_MAX)}
    return _pack(format, weight, scale, **kept)


def _fp8(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    """One scale for all of the group, as engines want that fuse its layers."""
    scale = FP8.scale(torch.stack([weight.abs().max() for weight in weights.values()]).max())
    importance = _importance("fp8", seen, settings)
    if importance is not None:
        together = torch.cat(list(weights.values()))
        scale = scales.searched(together.reshape(1, -1), FP8, importance.repeat(len(together)))[0]
    given = _static_input_scale(seen, E4M3_MAX)
    return {name: _pack("fp8", weight, scale, input_scale=given) for name, weight in weights.items()}


def _fp8_per_channel(
    weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    importance = _importance("fp8_per_channel", seen, settings)
    return {n: _pack("fp8_per_channel", w, _scale(w, FP8, importance)) for n, w in weights.items()}


def _nvfp4(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    largest = torch.stack([weight.abs().max() for weight in weights.values()]).max()
    second = largest / (E2M1_MAX * E4M3_MAX)
    kept = {"weight_scale_2": second, "input_scale": _static_input_scale(seen, E2M1_MAX * E4M3_MAX)}
    made = {}
    for name, weight in weights.items():
        scale = NVFP4QTensor.get_weights_scaling_factor(weight, 16, second)[0]
        made[name] = _pack("nvfp4", weight, scale, **kept)
    return made


def _mxfp4(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    given = _static_input_scale(seen, E4M3_MAX)
    made = {}
    for name, weight in weights.items():
        packed, scale = MXFP4QTensor.quantize(weight, block_size=32)
        scale = scale.reshape(len(weight), -1)
        made[name] = Quantized(Layout("W4A8_MXFP4_FP8", 32), packed._quantized_data, scale, input_scale=given)
    return made
