"""The recipe's formats: how the weights of layers that share an input become the tensors that ModelOpt's export holds.

`runtime.rounding.quantizers` rounds and packs weights; here stands what looks at activations besides: `channels`,
`gptq`, `descent`, scales of activations and the importance of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization.methods import channels, descent, gptq
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import Quantized, layout_of
from trimtab.runtime.rounding import inputs, quantizers, scales
from trimtab.runtime.rounding.folding import Tied, free


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
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization, tied: Tied = free
) -> torch.Tensor | None:
    """Returns what the columns of the weights are multiplied by before rounding, float32 [in], or None.

    Args:
        tied: see `channels`.
    """
    method = settings.channels(format)
    if not method:
        return None
    parts = [part for weight in weights.values() for part in weight.split(quantizers.slice_rows(weight))]
    if method == "smoothquant":
        return channels.smoothquant(parts, seen.amax, seen.second_moment)[0]
    size, storage = layout_of(format, settings).group_size, FORMATS[format].storage
    numbers = scales.E2M1 if storage.second_scale == "blocks" else quantizers.numbers_of(format)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.unflatten(1, (-1, size or weight.shape[1]))
        scale = scales.from_maximum(blocks, numbers)[..., None]
        return numbers.round(blocks / scale).mul_(scale).flatten(1)

    if method == "smooth":
        of_inputs = partial(inputs.rounded, storage.inputs)
        return channels.smooth([*weights.values()], seen.second_moment, rounded, of_inputs, tied)
    return channels.awq(parts, seen.second_moment, rounded, tied)


def quantize(
    format: str, weights: Mapping[str, torch.Tensor], seen: Input, settings: Quantization
) -> dict[str, Quantized]:
    """Returns the stored tensors of layers that share an input, by layer.

    Args:
        format: one of the catalog's that quantizes layers.
        weights: floating point [out, in] each, times the channel scale if there is one.
        seen: of the input, divided by the channel scale; without its Gram matrix all are rounded to nearest.
        settings: group_size, scales.
    """
    importance = seen.second_moment if settings.searches_scales(format) else None
    if settings.rounding(format) == "gptq" and seen.gram is not None:
        made = _gptq(format, weights, seen, settings, importance)
    else:
        made = quantizers.round_weights(format, weights, settings, importance)
    return {name: _with_input_scale(layer, seen) for name, layer in made.items()}


def _gptq(
    format: str,
    weights: Mapping[str, torch.Tensor],
    seen: Input,
    settings: Quantization,
    importance: torch.Tensor | None,
) -> dict[str, Quantized]:
    """Rounds layers that share an input as one matrix, of which it takes float32 copies: the Hessian is factored once.
    """
    numbers = quantizers.numbers_of(format, weights.values())
    found = quantizers.weight_scales(format, weights, settings, importance, numbers)
    by_group = {n: scale if scale.dim() == 2 else scale.reshape(-1, 1) for n, scale in found.items()}
    each = torch.cat([scale.expand(len(weights[n]), -1) for n, scale in by_group.items()])  # one, or one of each row
    together = torch.cat([weight.float() for weight in weights.values()])
    damping = gptq.DAMPING if settings.damping is None else settings.damping
    of_weights = each.repeat_interleave(together.shape[1] // each.shape[1], dim=1)
    rounded = gptq.round_weights(together, seen.gram, of_weights, numbers, damping)
    del of_weights
    rows = [len(weight) for weight in weights.values()]
    if settings.sweeps:
        rounded, each = descent.descend(together, rounded, seen.gram, each, numbers, damping, settings.sweeps)
        if each.shape[1] > 1:
            found = dict(zip(weights, each.split(rows), strict=True))
    parts = zip(weights, rounded.split(rows), strict=True)
    return {name: quantizers.pack(format, part, found[name], settings, numbers) for name, part in parts}


def _with_input_scale(layer: Quantized, seen: Input) -> Quantized:
    if "input_scale" not in layer.layout.scales:
        return layer
    return replace(layer, input_scale=inputs.static_scale(layer.layout.storage.inputs, seen.amax.max()))
