"""Prunes a checkpoint into a smaller, ordinary transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from trimtab.components.pruning import depth, sparsity
from trimtab.errors import Failure
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
        Failure: `unsupported`, more blocks to remove than the model has.
    """
    settings = TypeAdapter(Pruning).validate_python(parameters)
    if isinstance(settings, SparsePruning):
        measured = Path(calibration) if calibration else None
        return sparsity.prune(Path(checkpoint), measured, Path(output), Path(scratch), settings)
    model, tokenizer = checkpoints.load(Path(checkpoint), torch.bfloat16)
    _prune_depth(model, settings, Measurements(Path(calibration), Path(checkpoint), "calibration"))
    checkpoints.save(model, tokenizer, Path(output))
    weights = [layer.weight for layer in observe.linears(model).values()]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    return {"parameters": model.num_parameters(), "zeros": zeros, "blocks": model.config.num_hidden_layers}


def _prune_depth(model: torch.nn.Module, settings: DepthPruning, measured: Measurements) -> None:
    have = model.config.num_hidden_layers
    if settings.blocks >= have:
        reason = f"prune.blocks: cannot remove {settings.blocks} of {have} blocks; write at most {have - 1}"
        raise Failure("unsupported", reason)
    depth.remove_blocks(model, depth.least_influential(measured["block_influence"], settings.blocks))
