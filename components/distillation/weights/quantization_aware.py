"""Quantization-aware distillation: the student trains with the weights that quantization will make of its own.

In each product stands the weight rounded as the export will store it, with scales from the weight of that step; the
gradient passes straight through to the weight that is kept. What is saved is the weight before rounding, in
bfloat16, which the quantize stage rounds to the very numbers that training saw. Where the format rounds activations,
they are rounded too; a static scale is that of the batch, for calibration, which sets it, reads the finished student.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432), the
straight-through estimator; Jacob et al. 2018, "Quantization and Training of Neural Networks" (arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from trimtab.components.distillation.weights.reparametrization import Reparametrization, stored_weight
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.measure import observe
from trimtab.runtime.rounding import inputs, quantizers


class _StraightThrough(torch.autograd.Function):
    """What was rounded, with the gradient of what it was rounded from."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Rounding(nn.Module):
    """A parametrization: the weight as the export of a bfloat16 checkpoint stands for it.

    Args:
        settings: the format and its group size.
        beside: the other layers that read the same input, which share a scale with it in some formats.
    """

    is_stored = False

    def __init__(self, settings: Quantization, beside: list[nn.Linear]):
        super().__init__()
        self.settings = settings
        self.beside = tuple(beside)  # in a tuple, for they are not modules of this one

    @torch.no_grad()
    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the rounded weight, [out, in], in the weight's type."""
        stored = weight.bfloat16()
        largest = None
        if self.settings.row.storage.shares_scale:
            largest = quantizers.largest_of([stored, *(stored_weight(layer).bfloat16() for layer in self.beside)])
        made = quantizers.round_weights(self.settings.format, {"": stored}, self.settings, largest=largest)
        return layer_layout.dequantize(made[""]).to(weight.dtype)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight, self.rounded(weight))


class QuantizationAware(Reparametrization):
    """Rounds the named layers, and what they read if that is wanted and the format rounds it.

    The held-out losses before and after are both those of the rounded student.
    """

    def __init__(self, settings: Quantization, layers: Collection[str], with_inputs: bool = False):
        self.settings, self.names = settings, layers
        self.inputs = settings.row.storage.inputs if with_inputs else None
        self._hooks: list[RemovableHandle] = []

    def attach(self, student: nn.Module) -> None:
        layers = observe.linears(student)
        for group in observe.linear_groups(student):
            mine = [layers[name] for name in group.layers if name in self.names]
            for layer in mine:
                beside = [other for other in mine if other is not layer]
                parametrize.register_parametrization(layer, "weight", Rounding(self.settings, beside))
                if self.inputs:
                    self._hooks.append(layer.register_forward_pre_hook(self._round_inputs))

    def finish(self, student: nn.Module) -> None:
        super().finish(student)
        for hook in self._hooks:
            hook.remove()

    def _round_inputs(self, layer: nn.Module, read: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = read
        with torch.no_grad():
            rounded = inputs.rounded(self.inputs, x)
        return _StraightThrough.apply(x, rounded.to(x.dtype))
