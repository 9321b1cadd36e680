"""Which weights go: those with the lowest scores of a row, or of each m along it."""

from __future__ import annotations

import torch


def lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Marks the `sparsity` share of each row that has the lowest scores, the first among equals: bool [rows, n].

    Args:
        scores: [rows, n].
        sparsity: 0 to 1; the count is rounded.
    """
    count = round(sparsity * scores.shape[1])
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < limit, scores == limit
    missing = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Marks of each m scores along a row all but the n highest, the first among equals: bool [rows, columns].

    Args:
        scores: [rows, columns]; m divides the columns.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (n:m as here: n of m are left).
    """
    groups = scores.unflatten(1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], True).flatten(1)
