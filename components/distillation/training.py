"""The training loop: a student learns what its teacher says, with exact resume and early stopping."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import nn

from trimtab import progress
from trimtab.components.distillation import processes
from trimtab.components.distillation.data import Batches
from trimtab.components.distillation.objective import Objective
from trimtab.components.distillation.optimization import Optimizer, schedule
from trimtab.components.distillation.reparametrization import Reparametrization
from trimtab.components.distillation.resume import Checkpoint, Curve
from trimtab.errors import Failure
from trimtab.recipe import Distillation

#: Times that the held-out loss is measured during a training, evenly spread; fewer where the training is so short that
#: more than a window would be measured for every two that are trained on.
EVALUATIONS = 20
#: Seconds between two looks at the losses of a GPU, which would wait for each other at every one.
SECONDS_BETWEEN_LOOKS = 1.0


@torch.no_grad()
def heldout_loss(objective: Objective, windows: torch.Tensor) -> float:
    """Returns the mean loss of the held-out windows, int64 [windows, length], in nats a token.

    They are the first of all windows, and each process measures its share of them.
    """
    student, places = objective.student, processes.share(torch.arange(len(windows)))
    was_training = student.training
    student.eval()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for some in places.split(_windows_at_once(student, windows.shape[1])):
        total += objective(windows[some].to(student.device), some) * len(some)
    student.train(was_training)
    processes.average([total])
    return total.item() * processes.count() / len(windows)


def _windows_at_once(student: nn.Module, length: int) -> int:
    return max(1, (1024 if student.device.type == "cpu" else 16384) // length)


def _keep_block_inputs_alone(student: nn.Module) -> None:
    """Has the student compute each block once more in the backward pass, from its input, instead of keeping what is
    in it: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).

    Raises:
        Failure: `unsupported`, transformers has no such way for this architecture.
    """
    if not getattr(student, "supports_gradient_checkpointing", False):
        what = f"distill.activation_checkpointing: transformers has none for {type(student).__name__}"
        raise Failure("unsupported", f"{what}; write false, and a larger gradient_accumulation")
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Training:
    """One training of a student, in place.

    Args:
        objective: has the student, in the type and on the device that it trains in.
        heldout: windows, int64 [windows, length], the first of all windows.
        batches: the windows behind them, in batches.
        folder: for checkpoints; they survive a kill.
        change: is attached already, and is not finished here.
    """

    def __init__(
        self,
        objective: Objective,
        heldout: torch.Tensor,
        batches: Batches,
        settings: Distillation,
        folder: Path,
        change: Reparametrization | None = None,
    ):
        self.objective, self.heldout, self.batches, self.settings = objective, heldout, batches, settings
        self.student = objective.student
        self.change = change or Reparametrization()
        if settings.activation_checkpointing:
            _keep_block_inputs_alone(self.student)
        self.optimizer = Optimizer(self.student, settings, self.change.parameter_groups())
        self.checkpoint = Checkpoint(folder, self.student, self.optimizer)
        self.curve = Curve()
        self._unseen: list[torch.Tensor] = []
        self._looked_at = time.monotonic()

    def run(self) -> Curve:
        """Trains and returns the losses, those before a kill included; with early stopping, the best student is left.

        Raises:
            Failure: `training_diverged`, a loss that is not finite; names the step. The checkpoint of before is left.
        """
        steps = self.batches.steps
        self.curve = self.checkpoint.resume()
        self.student.train()
        for step in range(len(self.curve.train), steps):
            if self._has_stopped_improving:
                break
            self.change.before_step(step, steps)
            self._unseen.append(self.step(step))
            last, evaluates = step + 1 == steps, self._evaluates_after(step + 1)
            if evaluates or self._is_time_to_look:
                self._look()
            if last:
                self.change.before_step(steps, steps)
            if evaluates:
                self._evaluate(step + 1)
            if self.checkpoint.is_due and not last:
                self._look()
                self.checkpoint.save(self.curve)
        if self.curve.best is not None:
            self.checkpoint.restore_best()
        return self.curve

    def step(self, step: int) -> torch.Tensor:
        """Takes a step and returns its loss, a scalar on the device that nobody has waited for."""
        settings, device = self.settings, self.student.device
        places = self.batches.places(step)
        total = torch.zeros((), device=device)
        for part in places.chunk(settings.gradient_accumulation):
            mine = processes.share(part)
            tokens = self.batches.windows[mine].to(device, non_blocking=True)
            loss = self.objective(tokens, mine + len(self.heldout)) + self.change.penalty()
            (loss / settings.gradient_accumulation).backward()
            self.optimizer.gather()
            total += loss.detach() / settings.gradient_accumulation
        processes.average([*self.optimizer.gradients, total])
        self.optimizer.step(schedule(step, self.batches.steps, settings.schedule, settings.warmup))
        return total

    @property
    def _is_time_to_look(self) -> bool:
        return self.student.device.type == "cpu" or time.monotonic() - self._looked_at >= SECONDS_BETWEEN_LOOKS

    def _look(self) -> None:
        """Reads the losses that were left on the device."""
        steps = self.batches.steps
        for value in torch.stack(self._unseen).tolist() if self._unseen else []:
            if not math.isfinite(value):
                reason = f"the distillation loss is {value} at step {len(self.curve.train) + 1} of {steps}"
                raise Failure("training_diverged", f"{reason}; a lower learning_rate may help")
            self.curve.train.append(value)
        self._unseen, self._looked_at = [], time.monotonic()
        if processes.rank() == 0 and self.curve.train:
            progress.report("distill", f"loss {self.curve.train[-1]:.3f}", len(self.curve.train), steps)

    def _evaluates_after(self, taken: int) -> bool:
        """Whether the held-out loss is measured after so many steps: evenly spread, and after the last."""
        steps = self.batches.steps
        affordable = steps * self.batches.size // (2 * len(self.heldout))
        times = min(EVALUATIONS, steps, max(1, affordable))
        return taken * times // steps > (taken - 1) * times // steps

    def _evaluate(self, taken: int) -> None:
        loss = heldout_loss(self.objective, self.heldout)
        if not math.isfinite(loss):
            reason = f"the held-out loss is {loss} after step {taken} of {self.batches.steps}"
            raise Failure("training_diverged", f"{reason}; a lower learning_rate may help")
        self.curve.heldout.append((taken, loss))
        if not self.settings.early_stopping or not self.change.is_settled(taken, self.batches.steps):
            return
        known = dict(self.curve.heldout)
        if self.curve.best is None or loss < known[self.curve.best]:
            self.curve.best = taken
            self.checkpoint.keep_best()

    @property
    def _has_stopped_improving(self) -> bool:
        if not self.settings.early_stopping or self.curve.best is None:
            return False
        return sum(taken > self.curve.best for taken, _ in self.curve.heldout) >= self.settings.early_stopping
