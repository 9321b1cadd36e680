"""Zeros that a training keeps: a mask on each linear layer's weight, and which weights a mask keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from trimtab.components.distillation.reparametrization import Reparametrization
from trimtab.runtime import observe


def top(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """Returns masks that keep the highest of all scores together, True where a weight is kept, of the scores' shapes.

    Exactly round(sparsity · n) of the n weights are dropped, among equals too. Ranking takes some 16 bytes a weight
    of what is ranked together.
    """
    together = torch.cat([score.flatten() for score in scores])
    kept = together.numel() - round(sparsity * together.numel())
    mask = torch.zeros_like(together, dtype=torch.bool)
    mask[together.topk(kept, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


class Mask(nn.Module):
    """A parametrization: the weight where the mask is True, zero elsewhere, and no gradient there."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


class KeptZeros(Reparametrization):
    """What pruning set to zero stays zero: the student learns with the weights that it has left."""

    def attach(self, student: nn.Module) -> None:
        for layer in observe.linears(student).values():
            parametrize.register_parametrization(layer, "weight", Mask(layer.weight.detach() != 0))
