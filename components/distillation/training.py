"""The training loop: a student learns its teacher's logits, with exact resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from trimtab import progress
from trimtab.components.distillation.data import Data
from trimtab.components.distillation.loss import distillation_loss
from trimtab.components.distillation.reparametrization import Reparametrization
from trimtab.components.distillation.resume import Checkpoint
from trimtab.errors import Failure
from trimtab.recipe import Distillation


def loss(student: Any, teacher: Any, tokens: torch.Tensor, settings: Distillation) -> torch.Tensor:
    """Returns the distillation loss of windows, int64 [windows, length], in nats a token."""
    with torch.no_grad():
        target = teacher(tokens).logits[:, :-1].flatten(0, 1)
    logits = student(tokens).logits[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    return distillation_loss(logits, target, labels, settings.temperature, settings.label_weight)


def heldout_loss(student: Any, teacher: Any, windows: torch.Tensor, settings: Distillation) -> float:
    """Returns the mean distillation loss of windows, int64 [windows, length], in nats a token."""
    student.eval()
    with torch.no_grad():
        return sum(loss(student, teacher, w[None], settings).item() for w in windows) / len(windows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def train(
    student: Any,
    teacher: Any,
    data: Data,
    settings: Distillation,
    scratch: Path,
    reparametrization: Reparametrization | None = None,
) -> list[float]:
    """Trains in place and returns the loss of every step, those before a kill included.

    The reparametrization, if any, is attached already, and is not finished here.

    Raises:
        Failure: `training_diverged`, a loss that is not finite; names the step.
    """
    change = reparametrization or Reparametrization()
    groups = change.parameter_groups()
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in student.parameters() if id(parameter) not in apart]
    optimizer = torch.optim.AdamW([{"params": rest}, *groups], lr=settings.learning_rate, weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    saved = Checkpoint(scratch, student, optimizer)
    losses = saved.resume()
    student.train()
    for step in range(len(losses), data.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, data.steps, peak)
        change.before_step(step, data.steps)
        value = loss(student, teacher, data.batch(step), settings) + change.penalty()
        if not torch.isfinite(value):
            reason = f"the distillation loss is {value.item()} at step {step + 1} of {data.steps}"
            raise Failure("training_diverged", f"{reason}; a lower learning_rate may help")
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        progress.report("distill", f"loss {losses[-1]:.3f}", step + 1, data.steps)
        if saved.is_due:
            saved.save(losses)
    change.before_step(data.steps, data.steps)
    return losses
