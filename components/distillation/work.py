"""Trains a pruned student on its teacher's logits, with exact resume and a gate of its own."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab import files, progress
from trimtab.components.distillation.loss import distillation_loss
from trimtab.errors import Failure
from trimtab.recipe import Distillation
from trimtab.runtime import checkpoint as checkpoints
from trimtab.runtime import text

#: A kill costs at most this many steps.
STEPS_BETWEEN_CHECKPOINTS = 20
HELDOUT_WINDOWS = 4


def distill(
    checkpoint: str, model: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Distils and writes the better of the student before and after, by held-out loss.

    Narrow data can make a student worse; then the untrained one is returned and `improved` is 0.

    Returns:
        steps, heldout_loss_before, heldout_loss_after (distillation loss in nats a token), improved.

    Raises:
        Failure: `training_diverged`, a loss that is not finite; names the step.
        InputError: too little text for the held-out windows and one batch.
    """
    settings = Distillation.model_validate(files.without(parameters))
    student, tokenizer = checkpoints.load(Path(checkpoint), torch.float32)
    teacher, _ = checkpoints.load(Path(model), torch.float32)
    data = _Data(tokenizer, settings)
    before = _heldout_loss(student, teacher, data.heldout, settings)
    untrained = copy.deepcopy(student.state_dict())
    losses = _train(student, teacher, data, settings, Path(scratch))
    after = _heldout_loss(student, teacher, data.heldout, settings)
    if not after < before:
        student.load_state_dict(untrained)
    checkpoints.save(student.bfloat16(), tokenizer, Path(output))
    (Path(output) / "distillation.json").write_text(json.dumps({"loss": losses}), encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "steps": len(losses),
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "improved": float(after < before),
    }


class _Data:
    """Windows of text: the first are held out, the rest are shuffled by epoch with the recipe's seed."""

    def __init__(self, tokenizer: Any, settings: Distillation):
        source = text.read_text(settings.text, text.CALIBRATION_TEXT, tokenizer, "distill.text")
        available = len(tokenizer(source, add_special_tokens=False).input_ids) // settings.length
        least = HELDOUT_WINDOWS + settings.batch_size
        windows = text.windows(tokenizer, source, settings.length, max(available, least))
        self.heldout, self.training = windows[:HELDOUT_WINDOWS], windows[HELDOUT_WINDOWS:]
        self.settings = settings
        self.steps = max(1, round(settings.tokens / (settings.batch_size * settings.length)))

    def batch(self, step: int) -> torch.Tensor:
        """Returns the batch of a step, int64 [batch, length]: a function of the step alone, so resume is exact."""
        size = self.settings.batch_size
        epoch, position = divmod(step * size, len(self.training) // size * size)
        order = torch.randperm(
            len(self.training), generator=torch.Generator().manual_seed(self.settings.seed + epoch)
        )
        return self.training[order[position : position + size]]


def _loss(student: Any, teacher: Any, tokens: torch.Tensor, settings: Distillation) -> torch.Tensor:
    with torch.no_grad():
        target = teacher(tokens).logits[:, :-1].flatten(0, 1)
    logits = student(tokens).logits[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    return distillation_loss(logits, target, labels, settings.temperature, settings.label_weight)


def _heldout_loss(student: Any, teacher: Any, windows: torch.Tensor, settings: Distillation) -> float:
    student.eval()
    with torch.no_grad():
        return sum(_loss(student, teacher, w[None], settings).item() for w in windows) / len(windows)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def _train(student: Any, teacher: Any, data: _Data, settings: Distillation, scratch: Path) -> list[float]:
    """Trains in place and returns the loss of every step, those before a kill included."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    saved = _Checkpoint(scratch, student, optimizer)
    losses = saved.resume()
    student.train()
    for step in range(len(losses), data.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, data.steps, settings.learning_rate)
        loss = _loss(student, teacher, data.batch(step), settings)
        if not torch.isfinite(loss):
            reason = f"the distillation loss is {loss.item()} at step {step + 1} of {data.steps}"
            raise Failure("training_diverged", f"{reason}; a lower learning_rate may help")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.report("distill", f"loss {losses[-1]:.3f}", step + 1, data.steps)
        if (step + 1) % STEPS_BETWEEN_CHECKPOINTS == 0:
            saved.save(losses)
    return losses


class _Checkpoint:
    """Weights, optimizer moments and losses as safetensors; replaced as a whole, so a kill leaves the last one."""

    def __init__(self, folder: Path, student: Any, optimizer: torch.optim.AdamW):
        self.path = folder / "training.safetensors"
        self.student, self.optimizer = student, optimizer

    def save(self, losses: list[float]) -> None:
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for name, parameter in self.student.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self.path)

    def resume(self) -> list[float]:
        """Loads what a killed run saved, and returns its losses; an empty list where there is nothing."""
        if not self.path.exists():
            return []
        tensors = load_file(self.path)
        for name, parameter in self.student.named_parameters():
            parameter.data.copy_(tensors[f"weight.{name}"])
            keys = ("exp_avg", "exp_avg_sq", "step")
            self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in keys}
        losses = tensors["losses"].tolist()
        progress.report("distill", f"resumed after step {len(losses)}")
        return losses
