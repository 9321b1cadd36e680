"""The training loop: a student learns what its teacher says, with exact resume and early stopping."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.components.distillation.objective.objective import Objective
from trimtab.components.distillation.text.data import Batches
from trimtab.components.distillation.training import data_parallel
from trimtab.components.distillation.training.optimization import Optimizer, schedule
from trimtab.components.distillation.training.resume import Checkpoint, Curve
from trimtab.components.distillation.weights.reparametrization import Reparametrization
from trimtab.recipe import Distillation
from trimtab.runtime.measure import observe

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
    student, places = objective.student, torch.arange(len(windows))
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for part in places.split(data_parallel.count() * _windows_at_once(student, windows.shape[1])):
        mine = data_parallel.share(part)
        some = mine if len(mine) else part[:1]  # which counts for nothing: all processes gather each block together
        total += objective(windows[some].to(student.device), some) * len(mine)
    return data_parallel.add(total).item() / len(windows)


def _windows_at_once(student: nn.Module, length: int) -> int:
    return max(1, (1024 if student.device.type == "cpu" else 16384) // length)


def _keep_block_inputs_alone(student: nn.Module) -> None:
    """Has the student compute each block once more in the backward pass, from its input, instead of keeping what is
    in it: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).

    Not by transformers' own way, which is none in evaluation mode, and none for some architectures.
    """
    for block in observe.blocks(student):
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again


class Training:
    """One training of a student, in place; in evaluation mode, so that no random numbers are drawn: a student learns
    what its teacher says, of which dropout would make something else, and resume is exact.

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
        self.student.eval()
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
            if not last and self.checkpoint.is_due:
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
            mine = data_parallel.share(part)
            tokens = self.batches.windows[mine].to(device, non_blocking=True)
            loss = self.objective(tokens, mine + len(self.heldout)) + self.change.penalty()
            (loss / settings.gradient_accumulation).backward()
            self.optimizer.gather()
            total += loss.detach() / settings.gradient_accumulation
        data_parallel.average([*self.optimizer.gradients, total])
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
        if data_parallel.rank() == 0 and self.curve.train:
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
            self.checkpoint.keep_best(self.curve)

    @property
    def _has_stopped_improving(self) -> bool:
        if not self.settings.early_stopping or self.curve.best is None:
            return False
        return sum(taken > self.curve.best for taken, _ in self.curve.heldout) >= self.settings.early_stopping
