"""Quantizes a checkpoint, a shard at a time, into a unified Hugging Face checkpoint as ModelOpt exports it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trimtab import families
from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.components.quantization import by_block, configuration
from trimtab.components.quantization.groups import GroupQuantizer, finite
from trimtab.components.quantization.methods import kv_cache
from trimtab.components.quantization.mixed import assignment
from trimtab.families import fusion
from trimtab.families.fusion import Group
from trimtab.model import linear_layers
from trimtab.model.facts import inspect as read_facts
from trimtab.planning import checks
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout as stored
from trimtab.runtime.checkpoint import stream
from trimtab.runtime.checkpoint.model_files import Export, weight_file_bytes
from trimtab.runtime.measure import blockwise, measurements
from trimtab.runtime.measure.measurements import Measurements


def quantize(
    checkpoint: str,
    calibration: str | None,
    sensitivity: str | None,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
) -> dict[str, float]:
    """Writes the export: weights, scales, config, tokenizer.

    The model does not run, for it was measured before, unless GPTQ is part of it, see `by_block`.

    Args:
        checkpoint: the plain checkpoint to quantize.
        calibration: what the calibration pass measured; None for formats that look at weights alone.
        sensitivity: the harm of each format to each group of layers, for `mixed` and `exclude_sensitive`.
        output: the folder to fill.
        scratch: shards that are finished wait here, and are found after a kill.
        parameters: the recipe's `quantize`.

    Returns:
        bytes (of all safetensors), effective_bits (mean over the weights that may be quantized, without scales).

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
    is_read = calibration and settings.needs_statistics
    measured = Measurements(Path(calibration), source, "calibration") if is_read else None
    quantizer, blocks = GroupQuantizer(source, settings, chosen, measured), Path(scratch) / "blocks"
    shards, drop = Path(scratch) / "shards", partial(blockwise.drop, blocks)
    if settings.needs_grams:  # the first shard begins behind the last block
        by_block.quantize(source, Path(calibration), groups, quantizer, blocks, is_done=shards.exists())
    skip = [f"{families.named(facts.model_type).head}.weight"] if facts.tied_embeddings else []
    stream.rewrite(source, folder, shards, skip, _Shards(source, groups, quantizer, blocks), drop)
    stream.copy_the_rest(source, folder)
    shutil.rmtree(blocks, ignore_errors=True)
    layouts = {layer: stored.layout_of(form, settings) for layer, form in chosen.items()}
    configuration.write(folder, facts, layouts, settings.kv_cache, quantizer.dtype)
    budgeted = linear_layers.quantized_layers(facts, settings) if settings.row.keeps_plain else ()
    bits = stored.mean_bits(facts, layouts, {layer.name for layer in budgeted})
    return {"bytes": weight_file_bytes(folder), "effective_bits": bits}


class _Shards:
    """Turns the tensors of a shard into those of the export; holds one shard of the source at a time."""

    def __init__(self, source: Path, groups: Sequence[Group], quantizer: GroupQuantizer, blocks: Path):
        self.source, self.groups, self.quantizer, self.blocks = source, groups, quantizer, blocks

    @torch.inference_mode()
    def __call__(self, names: Sequence[str], title: str) -> dict[str, torch.Tensor]:
        shard = Export(self.source)  # opened anew: the pages that an open file has read count as memory
        quantizer, settings = self.quantizer, self.quantizer.settings
        written = by_block.read(self.blocks, names)
        groups = [g for g in self.groups if f"{g.layers[0]}.weight" in names and quantizer.changes(g)]
        groups = [g for g in groups if f"{g.layers[0]}.weight" not in written]
        for group in progress.track(groups, "quantize", f"quantizing {title}", len(groups)):
            written |= quantizer.quantize(shard, group, quantizer.seen(group)).tensors
        for name in names:
            if name not in written and name.removesuffix(".weight") not in quantizer.chosen:
                tensor = finite(shard, name)  # not copied: it may be an embedding of a gigabyte
                dtype = stored.dtype_beside(quantizer.family, name, tensor.dtype, quantizer.dtype)
                written[name] = _cast(name, tensor, dtype)
        if settings.kv_cache != "none":
            written |= kv_cache.scales(settings.kv_cache, quantizer.family, names, quantizer.measured.__getitem__)
        # Layers of a group share scalars, and safetensors wants memory of its own for each tensor.
        return {n: t.cpu().contiguous() if t.numel() > 1 else t.cpu().clone() for n, t in written.items()}


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A finite tensor in a type; what float16 has no number for would become infinity."""
    if dtype == torch.float16 and tensor.numel() and tensor.abs().max() > torch.finfo(dtype).max:
        largest = f"{tensor.abs().max().item():,.0f}"
        raise Failure("unsupported", f"{name}: holds {largest}, and float16 ends at 65,504; write format: bf16")
    return tensor.to(dtype)
