"""Quantizes layers that share an input, together with what takes their channel scale: the norm, or layer, before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trimtab import families
from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.families import fusion
from trimtab.families.fusion import Group
from trimtab.model.facts import inspect as read_facts
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure.block import Rounding
from trimtab.runtime.measure.measurements import Measurements
from trimtab.runtime.rounding import folding, inputs
from trimtab.runtime.rounding.folding import Folding, Tied

#: What the products of a group see of its input -> the Gram matrix of that, float32 [in, in], and by layer the weights
#: that are to be rounded, float32 [out, in].
Measure = Callable[[Rounding | None], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


@dataclass(frozen=True)
class Quantized:
    """A group of layers, quantized: the export's `tensors` by name; and of those that are quantized, by layer, the
    `weights`, float32 [out, in], that give the same with an input that nothing is folded into, and what the products
    see of that input; None where they see it as it is."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    reads: Rounding | None = None


class GroupQuantizer:
    """Turns the weights of layers that share an input into the tensors of the export.

    Args:
        source: the plain checkpoint.
        chosen: layer -> its format, of those that are quantized.
        measured: what calibration measured, None for formats that look at weights alone.
    """

    def __init__(
        self, source: Path, settings: Quantization, chosen: Mapping[str, str], measured: Measurements | None
    ):
        self.source, self.settings, self.chosen, self.measured = source, settings, chosen, measured
        facts = read_facts(source)
        self.family = families.named(facts.model_type)
        groups = fusion.groups([layer.name for layer in facts.linears], facts.model_type)
        self.folding = Folding(folding.makers(groups, chosen, settings, facts), facts, settings, self._found)
        self.dtype = layer_layout.plain_dtype(settings.format)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def layers(self, group: Group) -> list[str]:
        """Returns the layers of a group that are quantized."""
        return [layer for layer in group.layers if layer in self.chosen]

    def form(self, group: Group) -> str | None:
        """Returns the format of a group; None where all of its layers stay."""
        return next((self.chosen[layer] for layer in self.layers(group)), None)

    def changes(self, group: Group) -> bool:
        """Whether anything of a group is quantized, or takes the channel scale of another layer."""
        return self.form(group) is not None or any(map(self.folding.is_divided, group.layers))

    def seen(self, group: Group) -> Input:
        """Returns what calibration measured of a group's input."""
        return self._seen(group.layers[0])

    def _seen(self, layer: str) -> Input:
        if self.measured is None:
            return Input()
        found = {part: self.measured[f"{layer}.{part}"] for part in ("amax", "second_moment")}
        return Input(**{part: tensor.to(self.device) for part, tensor in found.items()})

    def quantize(
        self,
        shard: Export,
        group: Group,
        seen: Input,
        measure: Measure | None = None,
    ) -> Quantized:
        """Returns the layers of a group, and the norm before them, as the export has them.

        Args:
            seen: what was measured of the input.
            measure: measures the rest when it is known how the input is rounded.
        """
        layers, form = self.layers(group), self.form(group)
        found = {n: finite(shard, f"{n}.weight").to(self.device) for n in group.layers}
        written: dict[str, torch.Tensor] = {}
        rows = {n: self.folding.rows(n) for n in group.layers if self.folding.is_divided(n)}
        for name, scale in rows.items():
            found[name] = found[name] / scale[:, None]
            if shard.has(f"{name}.bias"):
                bias = finite(shard, f"{name}.bias").to(self.device)
                written[f"{name}.bias"] = (bias / scale).to(self.dtype)
        if form is None:
            return Quantized(written | {f"{n}.weight": found[n].to(self.dtype) for n in rows}, {})
        before = self._before(group, form, {n: found[n] for n in layers}, seen)
        scaled = before is not None
        if scaled:
            if group.norm:
                before, norm = self._folded(shard, group.norm, before)
                written |= norm
        elif FORMATS[form].storage.pre_quant_scale and not group.norm:  # TensorRT-LLM asks layers like these for one
            before = torch.ones(next(iter(found.values())).shape[1], device=self.device)
        reads = self._reads(form, seen, before)
        if measure is not None:
            gram, moved = measure(reads)
            seen = replace(seen, gram=gram, second_moment=gram.diagonal().clone())
            found |= {n: w / rows[n][:, None] if n in rows else w for n, w in moved.items()}
        if scaled:
            # A layer without a norm before it multiplies its own input, so one that is excluded sees it unscaled.
            found = {n: w / before if group.norm or n in layers else w for n, w in found.items()}
            seen = seen.scaled(1 / before)
        stored = packed_layers.quantize(form, {n: found[n] for n in layers}, seen, self.settings)
        for name in group.layers:
            if name not in stored:  # excluded, but the norm before it may be scaled all the same
                written[f"{name}.weight"] = found[name].to(self.dtype)
                continue
            written |= {f"{name}.{part}": tensor for part, tensor in stored[name].tensors.items()}
            if before is not None and not group.norm and FORMATS[form].storage.pre_quant_scale:
                written[f"{name}.pre_quant_scale"] = before.to(self.dtype)
        return Quantized(written, {n: _multiplied(layer, before, rows.get(n)) for n, layer in stored.items()}, reads)

    def _reads(self, form: str, seen: Input, before: torch.Tensor | None) -> Rounding | None:
        """What the products of layers see of an input that they multiply by `before`, in the input's own units; None
        where that is the input, and where nothing was measured, for then the model does not run."""
        rounding = FORMATS[form].storage.inputs
        if rounding is None or seen.amax is None:
            return None
        before = torch.ones_like(seen.amax) if before is None else before
        scale = inputs.static_scale(rounding, (seen.amax * before).max()) if rounding.scale == "static" else None
        return lambda x: inputs.rounded(rounding, x * before, scale).div_(before).to(x.dtype)

    def _before(
        self, group: Group, form: str, weights: Mapping[str, torch.Tensor], seen: Input
    ) -> torch.Tensor | None:
        """What the input of the group's quantized layers is multiplied by, float32 [in], as it is stored; or None."""
        layer = group.layers[0]
        if (scale := self.folding.columns(layer)) is not None:
            return 1 / scale
        if not self.family.scales_channels(layer) or not (group.norm or FORMATS[form].storage.pre_quant_scale):
            return None
        scale = packed_layers.channel_scale(form, weights, seen, self.settings)
        return None if scale is None else (1 / scale).to(self.dtype).float()  # weights make up for what is really there

    def _found(self, layer: str, tied: Tied) -> torch.Tensor:
        """The channel scale of a layer that goes into the one before, float32 [in]."""
        weight = finite(Export(self.source), f"{layer}.weight").to(self.device)
        form = self.chosen[layer]
        return packed_layers.channel_scale(form, {layer: weight}, self._seen(layer), self.settings, tied)

    def _folded(
        self, shard: Export, name: str, before: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Puts a scale of channels into a norm: what it then really multiplies by besides, and the norm's tensors."""
        offset = self.family.norm_offset
        norm = finite(shard, f"{name}.weight").to(self.device).float() + offset
        folded = (norm * before - offset).to(self.dtype)
        written = {f"{name}.weight": folded}
        applied = folded.float() + offset
        before = torch.where(applied == 0, before, applied / norm)
        if shard.has(f"{name}.bias"):
            bias = finite(shard, f"{name}.bias").to(self.device)
            written[f"{name}.bias"] = (bias.float() * before).to(self.dtype)
        return before, written


def finite(shard: Export, name: str) -> torch.Tensor:
    """Returns a tensor of a checkpoint as its file holds it.

    Raises:
        InputError: it holds NaN or infinity.
    """
    tensor = shard.view(name)
    check_finite(name, tensor)
    return tensor


def _multiplied(
    layer: layer_layout.Quantized, before: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    weight = layer_layout.dequantize(layer)
    weight = weight if before is None else weight * before
    return weight if rows is None else weight * rows[:, None]
