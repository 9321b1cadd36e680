"""What changes the student's weights while it trains: sparsity that is learned, rounding that is rehearsed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Reparametrization:
    """A way for the training loop to see other weights than it stores; this one changes nothing.

    Subclasses put `torch.nn.utils.parametrize` on the student's linear layers. Their parameters and buffers are the
    student's own from then on, by name, so a checkpoint of the training holds them and resume is exact; everything
    else that a subclass needs at a step must be a function of the step.
    """

    #: Whether the student as it was before training is an alternative to the trained one. Where training is what
    #: makes it sparse, it is not, and the trained one is returned however the held-out losses compare.
    untrained_is_an_answer = True

    def attach(self, student: nn.Module) -> None:
        """Changes the student, once, before anything is measured; it is on its device and in its type."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns optimizer groups for parameters that want a learning rate of their own.

        Each is {"params": [parameters of the student], "lr": peak}; warm-up and decay are those of all others.
        What is in no group trains with the recipe's learning rate.
        """
        return []

    def before_step(self, step: int, steps: int) -> None:
        """Prepares the weights for a step, 0 to steps - 1; called with `steps` once more after the last."""

    def penalty(self) -> torch.Tensor | float:
        """Returns what a step's loss has besides the distillation loss: a scalar with its gradient, in nats a token."""
        return 0.0

    def is_settled(self, step: int, steps: int) -> bool:
        """Returns whether the student as it is after `step` steps may be kept as the best one by early stopping."""
        return True

    def finish(self, student: nn.Module) -> None:
        """Bakes the changed weights in and removes the change: an ordinary model is left."""
