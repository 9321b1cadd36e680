"""Where a channel scale goes that no tensor of its own holds: into the layer before, whose rows are divided by it.

Values make the input of attention's output layer, and what a gate multiplies makes that of the layer behind the
neurons, so the model computes the same when a row there is divided by what a column here is multiplied by. A head of
values that several query heads read has one scale for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from trimtab import families
from trimtab.catalog.formats import FORMATS
from trimtab.families.fusion import Group
from trimtab.model.facts import ModelFacts
from trimtab.recipe import Quantization

#: A channel scale, float32 [in], -> one with the same value for all channels that must have one.
Tied = Callable[[torch.Tensor], torch.Tensor]
#: (layer, how its channels are tied) -> its channel scale, float32 [in].
Find = Callable[[str, Tied], torch.Tensor]


def makers(
    groups: Iterable[Group], chosen: Mapping[str, str], settings: Quantization, facts: ModelFacts
) -> dict[str, str]:
    """Returns the layers whose channel scale goes into the layer before, each with that layer.

    Args:
        groups: all linear layers.
        chosen: the format of each layer that is quantized.
    """
    family, sizes = families.named(facts.model_type), {layer.name: layer for layer in facts.linears}
    found = {}
    for group in groups:
        layer, form = group.layers[0], chosen.get(group.layers[0])
        before = family.layer_before(layer) if family.scales_channels(layer) else None
        if form is None or before not in sizes or not settings.channels(form) or FORMATS[form].storage.pre_quant_scale:
            continue
        rows, columns = sizes[before].out_features, sizes[layer].in_features
        if rows == columns or not (columns % rows or rows % facts.head_dim):
            found[layer] = before
    return found


class Folding:
    """The scales that go into layers before, each found once."""

    def __init__(self, makers: Mapping[str, str], facts: ModelFacts, settings: Quantization, find: Find):
        self._makers, self._find, self._settings = makers, find, settings
        self._after = {before: layer for layer, before in makers.items()}
        self._sizes = {layer.name: layer for layer in facts.linears}
        self._head_dim = facts.head_dim
        self._found: dict[str, torch.Tensor] = {}

    def is_divided(self, layer: str) -> bool:
        """Whether a layer's rows take the channel scale of another."""
        return layer in self._after

    def columns(self, layer: str) -> torch.Tensor | None:
        """Returns what a layer's columns are multiplied by and the layer before divided by, float32 [in], or None."""
        if layer not in self._makers:
            return None
        if layer not in self._found:
            sizes = self._sizes[layer].in_features, self._sizes[self._makers[layer]].out_features
            scale = self._find(layer, partial(tied, sizes[1], self._head_dim) if len({*sizes}) > 1 else free)
            # A cache that rounds values has a range for them, which they must not leave.
            self._found[layer] = scale if self._settings.kv_cache == "none" else scale / scale.min()
        return self._found[layer]

    def rows(self, layer: str) -> torch.Tensor | None:
        """Returns what a layer's rows are divided by, float32 [out], or None."""
        scale = self.columns(self._after[layer]) if layer in self._after else None
        if scale is None or len(scale) == self._sizes[layer].out_features:
            return scale
        return by_head(scale, self._sizes[layer].out_features, self._head_dim)[:, 0].flatten()


def free(scale: torch.Tensor) -> torch.Tensor:
    """Returns a channel scale as it is: no channels are tied."""
    return scale


def by_head(channels: torch.Tensor, rows: int, head_dim: int) -> torch.Tensor:
    """Returns something of each input channel of attention's output layer by the heads of values that make it:
    [query heads * head_dim] -> [heads of values, query heads that share one, head_dim]."""
    return channels.view(rows // head_dim, -1, head_dim)


def tied(rows: int, head_dim: int, scale: torch.Tensor) -> torch.Tensor:
    """Returns a scale with one value for all channels that a row of the layer before makes: their geometric mean."""
    heads = by_head(scale, rows, head_dim)
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)


def widened(rows: torch.Tensor, columns: int, head_dim: int) -> torch.Tensor:
    """Returns something of each row of the layer before by the input channels that it makes: [out] -> [columns]."""
    if len(rows) == columns:
        return rows
    return rows.view(-1, 1, head_dim).expand(-1, columns // len(rows), -1).reshape(-1)
