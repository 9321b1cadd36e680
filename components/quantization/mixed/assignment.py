"""Which layer gets which format: all the same, all but some, or by a budget of bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.catalog import layer_times
from trimtab.components.quantization.mixed import allocation, sensitivity
from trimtab.families import fusion
from trimtab.model import linear_layers
from trimtab.model.facts import ModelFacts
from trimtab.recipe import Quantization

#: What a layer that stays in 16 bits has for a format.
PLAIN = "bf16"


def choose(
    groups: Sequence[fusion.Group], facts: ModelFacts, settings: Quantization, harms: Path | None
) -> dict[str, str]:
    """Returns the format of every layer that is quantized.

    Args:
        groups: all linear layers; those of one group share a format, because engines fuse them.
        harms: the sensitivity tree, for `mixed` and `exclude_sensitive`.

    Raises:
        Failure: `unsupported`, a bit budget that no assignment meets.
    """
    if settings.row.is_cast:
        return {}
    wanted = {layer.name for layer in linear_layers.quantized_layers(facts, settings)}
    if not settings.needs_sensitivity:
        return dict.fromkeys(sorted(wanted), settings.format)
    measured = sensitivity.read(harms)
    options = (*settings.layer_formats, *((PLAIN,) if settings.row.keeps_plain else ()))
    sizes = {layer.name: layer.parameters for layer in facts.linears}
    open_groups = []
    for group in groups:
        if layers := tuple(layer for layer in group.layers if layer in wanted):
            weights = sum(sizes[layer] for layer in layers)
            open_groups.append(allocation.Group(layers, weights, {**measured[group.layers[0]], PLAIN: 0.0}))
    open_groups.sort(key=lambda group: -group.harm[settings.layer_formats[0]])
    open_groups = open_groups[settings.exclude_sensitive :]
    if settings.row.mixes:
        times = layer_times.relative(options, settings.step_tokens) if settings.max_time else None
        found = allocation.allocate(open_groups, options, settings.effective_bits, times, settings.max_time or 1.0)
        return {layer: form for layer, form in found.items() if form != PLAIN}
    return {layer: settings.format for group in open_groups for layer in group.layers}
