"""Prunes a checkpoint into a smaller, ordinary transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from trimtab import shapes
from trimtab.components.pruning import depth, sparsity, width
from trimtab.errors import Failure
from trimtab.model import inspect
from trimtab.recipe import DepthPruning, Pruning, SparsePruning
from trimtab.runtime import checkpoint as checkpoints
from trimtab.runtime import observe
from trimtab.runtime.measurements import Measurements


def prune(
    checkpoint: str, calibration: str | None, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Applies the recipe's pruning and writes the checkpoint.

    Returns:
        parameters, zeros (share of zero weights in the linear layers), blocks.

    Raises:
        InputError: the calibration is another model's.
        Failure: `unsupported`, the model has less than is to be removed, or an architecture that is not known.
    """
    settings = TypeAdapter(Pruning).validate_python(parameters)
    facts = inspect(checkpoint)
    if reason := shapes.check(facts, settings):
        raise Failure("unsupported", reason)
    if isinstance(settings, SparsePruning):
        measured = Path(calibration) if calibration else None
        return sparsity.prune(Path(checkpoint), measured, Path(output), Path(scratch), settings)
    model, tokenizer = checkpoints.load(Path(checkpoint), torch.bfloat16)
    measured = Measurements(Path(calibration), Path(checkpoint), "calibration")
    if isinstance(settings, DepthPruning):
        choose = depth.least_influential_run if settings.contiguous else depth.least_influential
        depth.remove_blocks(model, choose(measured["block_influence"], settings.blocks))
    else:
        sizes = shapes.pruned(facts, settings)
        width.narrow(model, sizes, width.choose(model, sizes, measured), measured)
    checkpoints.save(model, tokenizer, Path(output))
    weights = [layer.weight for layer in observe.linears(model).values()]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    return {"parameters": model.num_parameters(), "zeros": zeros, "blocks": model.config.num_hidden_layers}
