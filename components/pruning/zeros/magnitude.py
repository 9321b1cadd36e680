"""Magnitude pruning: a pure function of one weight matrix."""

from __future__ import annotations

import torch

from trimtab.components.pruning.zeros import mask


def prune(weight: torch.Tensor, sparsity: float, n_m: tuple[int, int] | None = None) -> torch.Tensor:
    """Returns the matrix with the `sparsity` share of its smallest absolute values set to zero.

    Args:
        weight: [out_features, in_features].
        sparsity: share of zeros, 0 to 1.
        n_m: keep n of each m weights along a row instead.

    Source: Han et al. 2015, "Learning both Weights and Connections", applied to each layer by itself.
    """
    size = weight.abs()
    gone = mask.n_of_m(size, *n_m) if n_m else mask.lowest(size.reshape(1, -1), sparsity).reshape(weight.shape)
    return weight.masked_fill(gone, 0)
