"""The recipe's formats: how the weights of layers that share an input become the tensors that ModelOpt's export holds.

`runtime.rounding.quantizers` rounds and packs weights; here stands what looks at activations besides: `channels`,
`gptq`, scales of activations and the importance of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from trimtab.catalog.formats import FORMATS
from trimtab.catalog.numbers import NUMBERS
from trimtab.components.quantization.methods import channels, gptq
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import E4M3_MAX, Quantized, layout_of
from trimtab.runtime.rounding import quantizers, scales


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
    parts = [part for weight in weights.values() for part in weight.split(quantizers.slice_rows(weight.shape[1]))]
    row = FORMATS[format]
    if row.channels == "awq":
        numbers, size = quantizers.numbers_of(format), layout_of(format, settings).group_size

        def rounded(weight: torch.Tensor) -> torch.Tensor:
            blocks = weight.unflatten(1, (-1, size or weight.shape[1]))
            scale = scales.from_maximum(blocks, numbers)[..., None]
            return numbers.round(blocks / scale).mul_(scale).flatten(1)

        return channels.awq(parts, seen.second_moment, rounded)
    if row.channels == "smoothquant":
        return channels.smoothquant(parts, seen.amax, seen.second_moment)[0]
    return None


def quantize(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    """Returns the stored tensors of layers that share an input, by layer.

    Args:
        format: one of the catalog's that quantizes layers.
        weights: floating point [out, in] each, times the channel scale if there is one.
        seen: of the input, divided by the channel scale.
        settings: group_size, scales.
    """
    importance = seen.second_moment if settings.searches_scales(format) else None
    if FORMATS[format].rounding == "gptq":
        return {name: _gptq(format, weight, seen, settings, importance) for name, weight in weights.items()}
    made = quantizers.round_weights(format, weights, settings, importance)
    return {name: _with_input_scale(layer, seen) for name, layer in made.items()}


def _gptq(
    format: str, weight: torch.Tensor, seen: Input, settings: Quantization, importance: torch.Tensor | None
) -> Quantized:
    """Takes a float32 copy of the matrix."""
    scale = quantizers.row_scales(format, weight, settings, importance)
    each = scale.reshape(len(weight), -1)
    each = each.repeat_interleave(weight.shape[1] // each.shape[1], dim=1)
    weight = gptq.round_weights(weight.float(), seen.gram, each, quantizers.numbers_of(format))
    return quantizers.pack(format, weight, scale, settings)


def _with_input_scale(layer: Quantized, seen: Input) -> Quantized:
    if "input_scale" not in layer.layout.scales:
        return layer
    inputs = layer.layout.storage.inputs
    largest = NUMBERS[inputs.numbers].largest * (E4M3_MAX if inputs.block else 1)  # a block's own scale is e4m3
    return replace(layer, input_scale=scales.scale_of(seen.amax.max(), largest))
