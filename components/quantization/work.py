"""Quantizes a checkpoint, a shard at a time, into a unified Hugging Face checkpoint as ModelOpt exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import families
from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization import configuration
from trimtab.components.quantization.methods import kv_cache, packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.components.quantization.mixed import assignment
from trimtab.families import fusion
from trimtab.families.fusion import Group
from trimtab.model.facts import inspect as read_facts
from trimtab.planning import checks
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout as stored
from trimtab.runtime.checkpoint import stream
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export, weight_file_bytes
from trimtab.runtime.measure import measurements
from trimtab.runtime.measure.measurements import Measurements


def quantize(
    checkpoint: str,
    calibration: str | None,
    gram: str | None,
    sensitivity: str | None,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
) -> dict[str, float]:
    """Writes the export: weights, scales, config, tokenizer. The model never runs: it was measured before.

    Args:
        checkpoint: the plain checkpoint to quantize.
        calibration: what the calibration pass measured; None for formats that look at weights alone.
        gram: the full second moments, for GPTQ.
        sensitivity: the harm of each format to each group of layers, for `mixed` and `exclude_sensitive`.
        output: the folder to fill.
        scratch: shards that are finished wait here, and are found after a kill.
        parameters: the recipe's `quantize`.

    Returns:
        bytes (of all safetensors), effective_bits (mean over the quantized weights, without scales).

    Raises:
        InputError: measurements of another model, or weights that are not finite.
        Failure: `unsupported`, a layer that the format cannot store, or a bit budget that no assignment meets.
    """
    settings = Quantization.model_validate(parameters)
    source, folder = Path(checkpoint), Path(output)
    facts = read_facts(source)
    if reason := checks.check_packing(settings, facts):
        raise Failure("unsupported", reason)
    groups = fusion.groups([layer.name for layer in facts.linears], facts.model_type)
    if sensitivity:
        measurements.check(Path(sensitivity), source, "sensitivity")
    chosen = assignment.choose(groups, facts, settings, Path(sensitivity) if sensitivity else None)
    # A calibration of which nothing is read may be the one that pruning read, of the model before.
    read = (("calibration", calibration, settings.needs_statistics), ("gram", gram, settings.needs_grams))
    measured = [Measurements(Path(folder), source, name) for name, folder, needed in read if folder and needed]
    quantizer = _Quantizer(source, settings, groups, chosen, measured)
    skip = [f"{families.named(facts.model_type).head}.weight"] if facts.tied_embeddings else []
    stream.rewrite(source, folder, Path(scratch) / "shards", skip, quantizer)
    stream.copy_the_rest(source, folder)
    layouts = {layer: stored.layout_of(form, settings) for layer, form in chosen.items()}
    configuration.write(folder, facts, layouts, settings.kv_cache, quantizer.dtype)
    return {"bytes": weight_file_bytes(folder), "effective_bits": stored.mean_bits(facts, layouts)}


class _Quantizer:
    """Turns the tensors of a shard into those of the export; holds one shard of the source at a time."""

    def __init__(
        self,
        source: Path,
        settings: Quantization,
        groups: Sequence[Group],
        chosen: Mapping[str, str],
        measured: Sequence[Measurements],
    ):
        self.source, self.settings, self.groups = source, settings, groups
        self.family = families.named(read_facts(source).model_type)
        self.chosen, self.measured = chosen, measured
        self.dtype = stored.plain_dtype(settings.format)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, names: Sequence[str], title: str) -> dict[str, torch.Tensor]:
        shard = Export(self.source)  # opened anew: the pages that an open file has read count as memory
        written: dict[str, torch.Tensor] = {}
        groups = [g for g in self.groups if f"{g.layers[0]}.weight" in names and self.chosen.keys() & {*g.layers}]
        for group in progress.track(groups, "quantize", f"quantizing {title}", len(groups)):
            written |= self._group(shard, group)
        for name in names:
            if name not in written and name.removesuffix(".weight") not in self.chosen:
                tensor = _finite(shard, name)  # not copied: it may be an embedding of a gigabyte
                written[name] = _cast(name, tensor, stored.dtype_beside(self.family, name, tensor.dtype, self.dtype))
        if self.settings.kv_cache != "none":
            written |= kv_cache.scales(self.settings.kv_cache, self.family, names, self._measured)
        # Layers of a group share scalars, and safetensors wants memory of its own for each tensor.
        return {n: t.cpu().contiguous() if t.numel() > 1 else t.cpu().clone() for n, t in written.items()}

    def _group(self, shard: Export, group: Group) -> dict[str, torch.Tensor]:
        """The export's tensors of layers that share an input, and of the norm before them."""
        layers = [layer for layer in group.layers if layer in self.chosen]
        form = self.chosen[layers[0]]
        weights = {n: _finite(shard, f"{n}.weight").to(self.device) for n in group.layers}
        quantized = {n: weights[n] for n in layers}
        seen = self._seen(form, group.layers[0])
        scales = self.family.scales_channels(layers[0])
        scale = packed_layers.channel_scale(form, quantized, seen, self.settings) if scales else None
        written: dict[str, torch.Tensor] = {}
        before = None
        if scale is not None:
            before = (1 / scale).to(self.dtype).float()  # as stored; weights make up for what is really there
            if group.norm:
                offset = self.family.norm_offset
                norm = _finite(shard, f"{group.norm}.weight").to(self.device).float() + offset
                written[f"{group.norm}.weight"] = folded = (norm * before - offset).to(self.dtype)
                applied = folded.float() + offset
                before = torch.where(applied == 0, before, applied / norm)
                if shard.has(f"{group.norm}.bias"):
                    bias = _finite(shard, f"{group.norm}.bias").to(self.device)
                    written[f"{group.norm}.bias"] = (bias.float() * before).to(self.dtype)
            # A layer without a norm before it multiplies its own input, so one that is excluded sees it unscaled.
            weights = {n: w / before if group.norm or n in layers else w for n, w in weights.items()}
            seen = seen.scaled(1 / before)
        elif FORMATS[form].storage.pre_quant_scale and not group.norm:  # TensorRT-LLM asks layers like these for one
            before = torch.ones(next(iter(weights.values())).shape[1])
        stored = packed_layers.quantize(form, {n: weights[n] for n in layers}, seen, self.settings)
        for name in group.layers:
            if name not in stored:  # excluded, but the norm before it may be scaled all the same
                written[f"{name}.weight"] = weights[name].to(self.dtype)
                continue
            written |= {f"{name}.{part}": tensor for part, tensor in stored[name].tensors.items()}
            if before is not None and not group.norm:
                written[f"{name}.pre_quant_scale"] = before.to(self.dtype)
        return written

    def _seen(self, form: str, layer: str) -> Input:
        """What was measured of the layer's input, as far as the format looks at it."""
        if not self.measured:
            return Input()
        found = {part: self._measured(f"{layer}.{part}") for part in ("amax", "second_moment")}
        if FORMATS[form].rounding == "gptq":
            found["gram"] = self._measured(f"{layer}.gram")
        return Input(**{part: tensor.to(self.device) for part, tensor in found.items()})

    def _measured(self, name: str) -> torch.Tensor:
        return next((m for m in self.measured if name in m), self.measured[0])[name]


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A finite tensor in a type; what float16 has no number for would become infinity."""
    if dtype == torch.float16 and tensor.numel() and tensor.abs().max() > torch.finfo(dtype).max:
        largest = f"{tensor.abs().max().item():,.0f}"
        raise Failure("unsupported", f"{name}: holds {largest}, and float16 ends at 65,504; write format: bf16")
    return tensor.to(dtype)


def _finite(shard: Export, name: str) -> torch.Tensor:
    tensor = shard.view(name)
    check_finite(name, tensor)
    return tensor
