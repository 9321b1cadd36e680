"""Zeroes weights of a checkpoint by the recipe's method, a shard at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from trimtab import hardware, progress
from trimtab.components.pruning import magnitude, sequential, sparsegpt, wanda
from trimtab.errors import Failure
from trimtab.fusion import block_of
from trimtab.model import inspect as read_facts
from trimtab.recipe import SparsePruning
from trimtab.runtime import hessian, stream
from trimtab.runtime.checkpoint import Export, check_finite
from trimtab.runtime.measurements import Measurements


def prune(
    checkpoint: Path, calibration: Path | None, output: Path, scratch: Path, settings: SparsePruning
) -> dict[str, float]:
    """Writes the checkpoint with zeros in the linear layers of its blocks; every tensor keeps its type.

    Returns:
        parameters, zeros (share of zero weights in those layers), blocks.

    Raises:
        InputError: the calibration is another model's, or a weight is not finite.
        Failure: `unsupported`, a layer that the pattern does not divide, or a model that the method cannot run.
    """
    facts = read_facts(checkpoint)
    if reason := hardware.check_pattern(settings, facts):
        raise Failure("unsupported", reason)
    layers = {layer.name: layer for layer in facts.linears if block_of(layer.name) is not None}
    measured = Measurements(calibration, checkpoint, "calibration") if settings.needs_statistics else None
    shares = dict.fromkeys(layers, settings.sparsity)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prune_group(weights: Mapping[str, torch.Tensor], gram: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = hessian.inverse_factor(gram, sparsegpt.DAMPING)
        return {n: sparsegpt.prune(w, factor, shares[n], settings.n_m) for n, w in weights.items()}

    def prune_layer(name: str, weight: torch.Tensor) -> torch.Tensor:
        if settings.method == "sparsegpt":
            return sequential.read(scratch / "blocks", f"{name}.weight")
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

    if settings.method == "sparsegpt":
        tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
        sequential.prune_blocks(checkpoint, tokens, list(layers), scratch / "blocks", prune_group)
    skip = ["lm_head.weight"] if facts.tied_embeddings else []
    stream.rewrite(checkpoint, output, scratch / "shards", skip, convert)
    stream.copy_the_rest(checkpoint, output)
    shutil.rmtree(scratch / "blocks", ignore_errors=True)
    zeros = _zeros(output, list(layers)) / sum(layer.parameters for layer in layers.values())
    return {"parameters": facts.parameters, "zeros": zeros, "blocks": facts.layers}


def _zeros(folder: Path, layers: Sequence[str]) -> int:
    """The zero weights of the layers, as the files hold them."""
    export = Export(folder)
    return sum(int((export.view(f"{layer}.weight") == 0).sum()) for layer in layers)
