"""Unstructured magnitude pruning: a pure function of one weight matrix."""

from __future__ import annotations

import torch


def prune(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the matrix with the `sparsity` share of its smallest absolute values set to zero.

    Args:
        weight: [out_features, in_features].
        sparsity: share of zeros, 0 to 1.

    Source: Han et al. 2015, "Learning both Weights and Connections", applied to each layer by itself.
    """
    zeros = round(sparsity * weight.numel())
    if zeros == 0:
        return weight.clone()
    smallest = weight.abs().flatten().argsort(stable=True)[:zeros]
    pruned = weight.flatten().clone()
    pruned[smallest] = 0
    return pruned.reshape(weight.shape)
