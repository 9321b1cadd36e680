"""What changes the student's weights while it trains: sparsity that is learned, training with the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def stored_weight(layer: nn.Module, name: str = "weight") -> torch.Tensor:
    """Returns the weight, or another parameter, that is left of a layer when its changes are baked in, without a
    gradient.

    A parametrization that has `is_stored = False` only stands for what a later stage does to the weight.
    """
    if not parametrize.is_parametrized(layer, name):
        return getattr(layer, name).detach()
    changes = layer.parametrizations[name]
    weight = changes.original.detach()
    for change in changes:
        if getattr(change, "is_stored", True):
            weight = change(weight)
    return weight.detach()


def stored_parameter(layer: nn.Module) -> nn.Parameter:
    """Returns the parameter that a layer's weight is made of."""
    is_changed = parametrize.is_parametrized(layer, "weight")
    return layer.parametrizations.weight.original if is_changed else layer.weight


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
        """Changes the student, once, before anything is measured, and before it is shared out among processes."""

    def watch(self, student: nn.Module) -> None:
        """Looks at the parameters that train, once, before anything is measured: on their device, and where several
        processes train, those of which this one holds a part."""

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

    def measures(self) -> dict[str, float]:
        """Returns metrics of the trained student, as the share of zeros."""
        return {}

    def finish(self, student: nn.Module) -> None:
        """Bakes the changed weights in and removes the changes: an ordinary model is left."""
        for layer in list(student.modules()):
            if parametrize.is_parametrized(layer, "weight"):
                weight = stored_weight(layer)
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                layer.weight.data = weight


class Together(Reparametrization):
    """Several changes, one upon the other: a weight passes through them in their order."""

    def __init__(self, changes: Sequence[Reparametrization]):
        self.changes = changes
        self.untrained_is_an_answer = all(change.untrained_is_an_answer for change in changes)

    def attach(self, student: nn.Module) -> None:
        for change in self.changes:
            change.attach(student)

    def watch(self, student: nn.Module) -> None:
        for change in self.changes:
            change.watch(student)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for change in self.changes for group in change.parameter_groups()]

    def before_step(self, step: int, steps: int) -> None:
        for change in self.changes:
            change.before_step(step, steps)

    def penalty(self) -> torch.Tensor | float:
        return sum(change.penalty() for change in self.changes)

    def is_settled(self, step: int, steps: int) -> bool:
        return all(change.is_settled(step, steps) for change in self.changes)

    def finish(self, student: nn.Module) -> None:
        for change in self.changes:  # the first of them bakes all in; each lets go of what is its own
            change.finish(student)

    def measures(self) -> dict[str, float]:
        return {name: value for change in self.changes for name, value in change.measures().items()}
