"""Trains a pruned student on its teacher's logits, with a gate of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trimtab import files, hardware
from trimtab.components.distillation.data import Data
from trimtab.components.distillation.masks import KeptZeros
from trimtab.components.distillation.movement import Movement
from trimtab.components.distillation.reparametrization import Reparametrization, Together
from trimtab.components.distillation.training import heldout_loss, train
from trimtab.errors import Failure
from trimtab.model import inspect
from trimtab.recipe import Distillation, MovementPruning, Quantization
from trimtab.runtime import checkpoint as checkpoints


def distill(
    checkpoint: str, model: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Distils and writes the better of the student before and after, by held-out loss.

    Narrow data can make a student worse; then the untrained one is returned and `improved` is 0.

    Returns:
        steps, heldout_loss_before, heldout_loss_after (distillation loss in nats a token), improved; `zeros`, the
        share of zeros in the linear layers, of a student that is pruned while it trains.

    Raises:
        Failure: `training_diverged`, a loss that is not finite; names the step.
        InputError: too little text for the held-out windows and one batch.
    """
    own = {name: value for name, value in files.without(parameters).items() if name != "weights"}
    settings = Distillation.model_validate(own)
    student, tokenizer = checkpoints.load(Path(checkpoint), torch.float32)
    teacher, _ = checkpoints.load(Path(model), torch.float32)
    data = Data(tokenizer, settings)
    change = _change(parameters.get("weights", {}), Path(checkpoint))
    change.attach(student)
    before = heldout_loss(student, teacher, data.heldout, settings)
    losses = train(student, teacher, data, settings, Path(scratch), change)
    after = heldout_loss(student, teacher, data.heldout, settings)
    measures = change.measures()
    change.finish(student)
    if change.untrained_is_an_answer and not after < before:
        student, _ = checkpoints.load(Path(checkpoint), torch.float32)
    checkpoints.save(student.bfloat16(), tokenizer, Path(output))
    (Path(output) / "distillation.json").write_text(json.dumps({"loss": losses}), encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "steps": len(losses),
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "improved": float(after < before),
        **measures,
    }


def _change(weights: dict[str, Any], checkpoint: Path) -> Reparametrization:
    """What the recipe wants of the student's weights while they train: zeros first, then rounding."""
    changes: list[Reparametrization] = []
    if weights.get("keep_zeros"):
        changes.append(KeptZeros())
    if "movement" in weights:
        changes.append(Movement(MovementPruning.model_validate(weights["movement"])))
    if "rounded" in weights:
        from trimtab.components.distillation.rehearsal import Rehearsal  # imports ModelOpt

        quantize, facts = Quantization.model_validate(weights["rounded"]), inspect(checkpoint)
        if reason := hardware.check_packing(quantize, facts):
            raise Failure("unsupported", reason)
        changes.append(Rehearsal(quantize, {layer.name for layer in hardware.quantized_layers(facts, quantize)}))
    return Together(changes)
