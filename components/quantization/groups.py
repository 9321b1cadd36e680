"""Quantizes layers that share an input, together with the norm before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab import families
from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.families.fusion import Group
from trimtab.model.facts import inspect as read_facts
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure.measurements import Measurements


@dataclass(frozen=True)
class Quantized:
    """A group of layers, quantized: the export's `tensors` by name, and by layer the `weights`, float32 [out, in], that
    give the same with an input that nothing is folded into; of those that are quantized."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


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
        self.settings, self.chosen, self.measured = settings, chosen, measured
        self.family = families.named(read_facts(source).model_type)
        self.dtype = layer_layout.plain_dtype(settings.format)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def layers(self, group: Group) -> list[str]:
        """Returns the layers of a group that are quantized."""
        return [layer for layer in group.layers if layer in self.chosen]

    def form(self, group: Group) -> str | None:
        """Returns the format of a group; None where all of its layers stay."""
        return next((self.chosen[layer] for layer in self.layers(group)), None)

    def seen(self, group: Group) -> Input:
        """Returns what calibration measured of a group's input."""
        if self.measured is None:
            return Input()
        found = {part: self.measured[f"{group.layers[0]}.{part}"] for part in ("amax", "second_moment")}
        return Input(**{part: tensor.to(self.device) for part, tensor in found.items()})

    def quantize(
        self, shard: Export, group: Group, seen: Input, weights: Mapping[str, torch.Tensor] | None = None
    ) -> Quantized:
        """Returns the layers of a group, and the norm before them, as the export has them.

        Args:
            seen: what was measured of the input.
            weights: what layers are to compute like, in place of what their files hold.
        """
        layers, form = self.layers(group), self.form(group)
        found = {n: finite(shard, f"{n}.weight").to(self.device) for n in group.layers}
        found |= weights or {}
        quantized = {n: found[n] for n in layers}
        scales = self.family.scales_channels(layers[0])
        scale = packed_layers.channel_scale(form, quantized, seen, self.settings) if scales else None
        written: dict[str, torch.Tensor] = {}
        before = None
        if scale is not None:
            before = (1 / scale).to(self.dtype).float()  # as stored; weights make up for what is really there
            if group.norm:
                before, norm = self._folded(shard, group.norm, before)
                written |= norm
            # A layer without a norm before it multiplies its own input, so one that is excluded sees it unscaled.
            found = {n: w / before if group.norm or n in layers else w for n, w in found.items()}
            seen = seen.scaled(1 / before)
        elif FORMATS[form].storage.pre_quant_scale and not group.norm:  # TensorRT-LLM asks layers like these for one
            before = torch.ones(next(iter(found.values())).shape[1], device=self.device)
        stored = packed_layers.quantize(form, {n: found[n] for n in layers}, seen, self.settings)
        for name in group.layers:
            if name not in stored:  # excluded, but the norm before it may be scaled all the same
                written[f"{name}.weight"] = found[name].to(self.dtype)
                continue
            written |= {f"{name}.{part}": tensor for part, tensor in stored[name].tensors.items()}
            if before is not None and not group.norm:
                written[f"{name}.pre_quant_scale"] = before.to(self.dtype)
        return Quantized(written, {n: _multiplied(layer, before) for n, layer in stored.items()})

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


def _multiplied(layer: layer_layout.Quantized, before: torch.Tensor | None) -> torch.Tensor:
    weight = layer_layout.dequantize(layer)
    return weight if before is None else weight * before
