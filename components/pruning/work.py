"""Prunes a checkpoint into a smaller, ordinary transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trimtab.base.errors import Failure
from trimtab.components.pruning.structured import depth, width, writing
from trimtab.components.pruning.zeros import sparsity
from trimtab.families.fusion import block_of
from trimtab.model import shapes
from trimtab.model.facts import ModelFacts, inspect
from trimtab.recipe import DepthPruning, Pruning, SparsePruning, WidthPruning
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure.measurements import Measurements


def prune(
    checkpoint: str, calibration: str | None, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Applies the recipe's pruning and writes the checkpoint, a shard or a block at a time.

    Args:
        scratch: what is finished waits there, and is found after a kill.

    Returns:
        parameters, zeros (share of zero weights in the linear layers), blocks.

    Raises:
        InputError: the calibration is another model's, or a weight is not finite.
        Failure: `unsupported`, the model has less than is to be removed, or an architecture that is not known.
    """
    settings = TypeAdapter(Pruning).validate_python(parameters)
    source, folders = Path(checkpoint), (Path(output), Path(scratch))
    facts = inspect(source)
    if reason := shapes.refusal(facts, settings):
        raise Failure("unsupported", reason)
    if isinstance(settings, SparsePruning):
        sparsity.prune(source, Path(calibration) if calibration else None, *folders, settings)
    else:
        measured = Measurements(Path(calibration), source, "calibration")
        writing.write(source, _left(source, facts, measured, settings), *folders)
    return _told(Path(output))


def _left(
    source: Path, facts: ModelFacts, measured: Measurements, settings: DepthPruning | WidthPruning
) -> writing.Left:
    if isinstance(settings, DepthPruning):
        choose = depth.least_influential_run if settings.contiguous else depth.least_influential
        return depth.without(source, choose(measured["block_influence"], settings.blocks))
    sizes = shapes.pruned(facts, settings)
    return width.keeping(source, sizes, width.choose(source, sizes, measured), measured)


def _told(folder: Path) -> dict[str, float]:
    """The metrics, of what the files hold."""
    facts, export = inspect(folder), Export(folder)
    layers = [layer for layer in facts.linears if block_of(layer.name) is not None]
    zeros = sum(int((export.view(f"{layer.name}.weight") == 0).sum()) for layer in layers)
    share = zeros / sum(layer.parameters for layer in layers)
    return {"parameters": facts.parameters, "zeros": share, "blocks": facts.layers}
