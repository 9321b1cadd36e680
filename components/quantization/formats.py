"""The recipe's formats: how the weights of layers that share an input become the tensors that ModelOpt's export holds.

The numbers are packed by ModelOpt's own functions, except INT4's, whose packer takes ten times as long as it needs;
scales come from `scales`, `channels` and `gptq`. Matrices are gone through in slices of whole rows, so that there is
no float32 copy of one, GPTQ's apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

from trimtab.components.quantization import channels, gptq, scales
from trimtab.components.quantization.scales import FP8, INT4, INT8, Numbers
from trimtab.recipe import AWQ_FORMATS, Quantization
from trimtab.runtime.formats import ALGORITHMS, E2M1_MAX, E4M3_MAX, Layout, Quantized, layout_of, pack_int4, unpack_int4

#: ModelOpt's own name of each quant_algo.
MODELOPT_NAMES = {
    "W8A16": "int8_wo",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4",
    "W4A8_MXFP4_FP8": "w4a8_mxfp4_fp8",
}
#: Weights of a slice: float32 temporaries of 4 MiB stay in a processor's cache.
SLICE = 1 << 20


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


def channel_scale(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> torch.Tensor | None:
    """Returns what the columns of the weights are multiplied by before rounding, float32 [in], or None."""
    parts = [part for weight in weights.values() for part in weight.split(_rows(weight.shape[1]))]
    if format in AWQ_FORMATS:

        def rounded(weight: torch.Tensor) -> torch.Tensor:
            blocks = weight.unflatten(1, (-1, settings.group_size))
            scale = scales.from_maximum(blocks, INT4)[..., None]
            return INT4.round(blocks / scale).mul_(scale).flatten(1)

        return channels.awq(parts, seen.second_moment, rounded)
    if format == "int8_sq":
        return channels.smoothquant(parts, seen.amax, seen.second_moment)[0]
    return None


def quantize(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    """Returns the stored tensors of layers that share an input, by layer.

    Args:
        format: a key of `runtime.formats.ALGORITHMS`.
        weights: floating point [out, in] each, times the channel scale if there is one.
        seen: of the input, divided by the channel scale.
        settings: group_size, scales.
    """
    made = {"fp8": _fp8, "fp8_per_channel": _fp8_per_channel, "nvfp4": _nvfp4, "mxfp4": _mxfp4}.get(format)
    if made:
        return made(weights, seen, settings)
    if format.startswith("int8"):
        return {name: _int8(format, weight, seen, settings) for name, weight in weights.items()}
    return {name: _int4(format, weight, seen, settings) for name, weight in weights.items()}


def _rows(columns: int) -> int:
    """The rows of a slice: an even number, because INT4 packs them in pairs."""
    return 2 * max(1, SLICE // columns // 2)


def _slices(weight: torch.Tensor, *beside: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields a matrix in slices, float32, each with the same rows of what stands beside it."""
    rows = _rows(weight.shape[1])
    for part, *others in zip(*(tensor.split(rows) for tensor in (weight, *beside)), strict=True):
        yield part.float(), *others


def _largest(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in any of the matrices, a float32 scalar."""
    return torch.stack([torch.stack(weight.aminmax()).abs().max() for weight in weights.values()]).max().float()


def _scales(weight: torch.Tensor, numbers: Numbers, importance: torch.Tensor | None, size: int = 0) -> torch.Tensor:
    """The scale of each row, float32 [out], or of each `size` weights of one, [out, in / size].

    `importance` [in] is what the error of a weight counts; None takes scales from the maximum.
    """
    if size and importance is not None:
        importance = importance.unflatten(0, (-1, size))
    found = []
    for (part,) in _slices(weight):
        blocks = part.unflatten(1, (-1, size)) if size else part
        if importance is None:
            found.append(scales.from_maximum(blocks, numbers))
        else:
            found.append(scales.searched(blocks, numbers, importance))
    return torch.cat(found)


def _importance(format: str, seen: Input, settings: Quantization) -> torch.Tensor | None:
    """The second moment of the input where scales are searched, else None."""
    return seen.second_moment if settings.searches_scales(format) else None


def _static_input_scale(seen: Input, largest: float) -> torch.Tensor:
    return scales.scale_of(seen.amax.max(), largest)


def _packed(format: str, weight: torch.Tensor, scale: torch.Tensor, **kept: torch.Tensor) -> Quantized:
    """A matrix as ModelOpt packs it, with a scale for all of it or one a row."""
    layout, parts = Layout(ALGORITHMS[format]), []
    for part, some in _slices(weight, scale.expand(len(weight)) if scale.dim() == 0 else scale):
        if layout.storage.dtype == torch.float8_e4m3fn:  # a searched scale may clip, and what overflows is NaN
            part = part.clamp(-E4M3_MAX * some[:, None], E4M3_MAX * some[:, None])
        parts.append(to_quantized_weight(part, some if scale.dim() else scale, MODELOPT_NAMES[layout.algo]))
    return Quantized(layout, torch.cat(parts), scale, **kept)


def _int8(format: str, weight: torch.Tensor, seen: Input, settings: Quantization) -> Quantized:
    kept = {"input_scale": _static_input_scale(seen, INT8.largest)} if format == "int8_sq" else {}
    return _packed(format, weight, _scales(weight, INT8, _importance(format, seen, settings)), **kept)


def _int4(format: str, weight: torch.Tensor, seen: Input, settings: Quantization) -> Quantized:
    size = settings.group_size
    scale = _scales(weight, INT4, _importance(format, seen, settings), size)
    if format == "int4_gptq":
        weight = gptq.round_weights(weight.float(), seen.gram, scale.repeat_interleave(size, dim=1), INT4)
    parts = []
    for part, some in _slices(weight, scale):
        numbers = INT4.round(part.unflatten(1, (-1, size)) / some[..., None])
        parts.append(pack_int4(numbers.flatten(1).to(torch.int8)))
    packed, kept = torch.cat(parts), {}
    if format == "w4a8_awq":
        largest = (unpack_int4(packed).unflatten(1, (-1, size)).abs().amax(-1) * scale).max()
        kept = {"weight_scale_2": largest / E4M3_MAX, "input_scale": _static_input_scale(seen, E4M3_MAX)}
    return Quantized(layout_of(format, settings), packed, scale.bfloat16(), **kept)


def _fp8(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    """One scale for all of the group, as engines want that fuse its layers."""
    amax, importance = _largest(weights), _importance("fp8", seen, settings)
    if importance is None:
        scale = FP8.scale(amax)
    else:
        parts = (part for weight in weights.values() for (part,) in _slices(weight))
        scale = scales.searched_for_all(parts, amax, FP8, importance)
    given = _static_input_scale(seen, E4M3_MAX)
    return {name: _packed("fp8", weight, scale, input_scale=given) for name, weight in weights.items()}


def _fp8_per_channel(
    weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    importance = _importance("fp8_per_channel", seen, settings)
    return {n: _packed("fp8_per_channel", w, _scales(w, FP8, importance)) for n, w in weights.items()}


def _nvfp4(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    second = _largest(weights) / (E2M1_MAX * E4M3_MAX)
    kept = {"weight_scale_2": second, "input_scale": _static_input_scale(seen, E2M1_MAX * E4M3_MAX)}
    layout, made = layout_of("nvfp4", settings), {}
    for layer, weight in weights.items():
        packed, scale = [], []
        for (part,) in _slices(weight):
            scale.append(NVFP4QTensor.get_weights_scaling_factor(part, layout.group_size, second)[0])
            name = MODELOPT_NAMES[layout.algo]
            packed.append(to_quantized_weight(part, scale[-1], name, second, layout.group_size))
        made[layer] = Quantized(layout, torch.cat(packed), torch.cat(scale), **kept)
    return made


def _mxfp4(weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization) -> dict[str, Quantized]:
    given = _static_input_scale(seen, E4M3_MAX)
    layout, made = layout_of("mxfp4", settings), {}
    for layer, weight in weights.items():
        packed, scale = [], []
        for (part,) in _slices(weight):
            numbers, exponents = MXFP4QTensor.quantize(part, block_size=layout.group_size)
            packed.append(numbers._quantized_data)
            scale.append(exponents.reshape(len(part), -1))
        made[layer] = Quantized(layout, torch.cat(packed), torch.cat(scale), input_scale=given)
    return made
