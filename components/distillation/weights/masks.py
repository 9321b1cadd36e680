"""Zeros that a training keeps: a mask on each linear layer's weight, and which weights a mask keeps."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from trimtab.components.distillation.training import sharding
from trimtab.components.distillation.weights.reparametrization import Reparametrization, stored_parameter
from trimtab.runtime.measure import observe


def top(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the mask that keeps the highest scores, True where a weight is kept, of the scores' shape.

    Exactly round(sparsity · n) of the n weights are dropped, among equals too.
    """
    kept = scores.numel() - round(sparsity * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(kept, sorted=False).indices] = True
    return mask.view(scores.shape)


class Mask(nn.Module):
    """A parametrization: the weight where the mask is True, zero elsewhere, and no gradient there."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


class KeptZeros(Reparametrization):
    """What pruning set to zero stays zero: the student learns with the weights that it has left.

    A zero without a gradient has no moments, so AdamW leaves it alone; and each process masks the part that it holds.
    """

    def watch(self, student: nn.Module) -> None:
        for layer in observe.linears(student).values():
            parameter = stored_parameter(layer)
            mask = sharding.local(parameter.detach()) != 0
            parameter.register_post_accumulate_grad_hook(partial(_mask_gradient, mask))


def _mask_gradient(mask: torch.Tensor, parameter: torch.Tensor) -> None:
    sharding.local(parameter.grad).mul_(mask)
