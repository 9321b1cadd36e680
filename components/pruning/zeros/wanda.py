"""Wanda: a weight counts by its size times that of what it is multiplied by. A pure function of tensors."""

from __future__ import annotations

import torch

from trimtab.components.pruning.zeros import mask


def prune(
    weight: torch.Tensor, second_moment: torch.Tensor, sparsity: float, n_m: tuple[int, int] | None = None
) -> torch.Tensor:
    """Returns the matrix with the `sparsity` share of each row that has the lowest |w| √E[x²] set to zero.

    Args:
        weight: [out_features, in_features].
        second_moment: E[x²] of each input channel, float32 [in_features].
        sparsity: share of zeros, 0 to 1.
        n_m: keep n of each m weights along a row instead.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """
    scores = weight.abs().float() * second_moment.sqrt()
    gone = mask.n_of_m(scores, *n_m) if n_m else mask.lowest(scores, sparsity)
    return weight.masked_fill(gone, 0)
