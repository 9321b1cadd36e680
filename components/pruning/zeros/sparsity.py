"""Zeroes weights of a checkpoint by the recipe's method, a shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from trimtab import families
from trimtab.base import progress
from trimtab.components.pruning.zeros import allocation, magnitude, sequential, sparsegpt, wanda
from trimtab.families.fusion import block_of
from trimtab.model.facts import inspect as read_facts
from trimtab.recipe import SparsePruning
from trimtab.runtime.checkpoint import stream
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure import blockwise, gradients, observe, routing
from trimtab.runtime.measure.measurements import Measurements
from trimtab.runtime.rounding import hessian


def prune(
    checkpoint: Path, calibration: Path | None, output: Path, scratch: Path, settings: SparsePruning
) -> None:
    """Writes the checkpoint with zeros in the linear layers of its blocks; every tensor keeps its type.

    The pattern divides every layer (`shapes.check`).

    Raises:
        InputError: the calibration is another model's, or a weight is not finite.
        Failure: `unsupported`, a model that the method cannot run.
    """
    facts = read_facts(checkpoint)
    layers = {layer.name: layer for layer in facts.linears if block_of(layer.name) is not None}
    measured = Measurements(calibration, checkpoint, "calibration") if settings.needs_statistics else None
    shares = dict.fromkeys(layers, settings.sparsity)
    if settings.allocation == "sensitivity":
        shares = _by_sensitivity(checkpoint, calibration, measured, layers, settings.sparsity, scratch / "shares.json")
    device, blocks, shards = _device(), scratch / "blocks", scratch / "shards"

    def prune_group(weights: Mapping[str, torch.Tensor], gram: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = hessian.inverse_factor(gram, sparsegpt.DAMPING)
        return {n: sparsegpt.prune(w, factor, shares[n], settings.n_m) for n, w in weights.items()}

    def prune_layer(name: str, weight: torch.Tensor) -> torch.Tensor:
        if settings.method == "sparsegpt":
            return sequential.read(blocks, f"{name}.weight")
        check_finite(f"{name}.weight", weight)
        weight = weight.to(device)
        if settings.method == "magnitude":
            return magnitude.prune(weight, shares[name], settings.n_m).cpu()
        return wanda.prune(weight, measured[f"{name}.second_moment"].to(device), shares[name], settings.n_m).cpu()

    @torch.inference_mode()
    def convert(names: Sequence[str], title: str) -> dict[str, torch.Tensor]:
        shard = Export(checkpoint)  # opened anew: the pages that an open file has read count as memory
        written = {}
        for name in progress.track(names, "prune", f"pruning {title}", len(names)):
            tensor, layer = shard.view(name), name.removesuffix(".weight")
            written[name] = prune_layer(layer, tensor) if layer in layers else tensor
        return written

    if settings.method == "sparsegpt" and not shards.exists():  # the first shard begins behind the last block
        rare = routing.recorded(calibration)
        sequential.prune_blocks(checkpoint, _tokens(calibration), layers, rare, blocks, prune_group)
    skip = [f"{families.named(facts.model_type).head}.weight"] if facts.tied_embeddings else []
    stream.rewrite(checkpoint, output, shards, skip, convert, partial(blockwise.drop, blocks))
    stream.copy_the_rest(checkpoint, output)
    shutil.rmtree(blocks, ignore_errors=True)
    (scratch / "shares.json").unlink(missing_ok=True)


def _by_sensitivity(
    checkpoint: Path,
    calibration: Path,
    measured: Measurements,
    layers: Iterable[str],
    sparsity: float,
    kept: Path,
) -> dict[str, float]:
    """The share of zeros of each layer, from one pass backward through the model; `kept` survives a kill."""
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    energy = gradients.energy(checkpoint, gradients.enough(_tokens(calibration)), "prune")
    observe.check_finite(energy)
    spectra, device, export = {}, _device(), Export(checkpoint)
    for name in layers:
        moment, weight = measured[f"{name}.second_moment"].to(device), export.view(f"{name}.weight").to(device)
        spectra[name] = allocation.spectrum(allocation.scores(weight, moment, energy[name].to(device)))
    shares = allocation.shares(spectra, sparsity)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(shares), encoding="utf-8")
    partial.replace(kept)
    return shares


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tokens(calibration: Path) -> torch.Tensor:
    return load_file(calibration / "tokens.safetensors")["tokens"].long()
