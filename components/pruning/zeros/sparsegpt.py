"""SparseGPT: prunes a matrix column by column and lets the columns still open make up for each weight that goes.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
"""

from __future__ import annotations

import torch

from trimtab.components.pruning.zeros import mask

#: What is added to the Hessian's diagonal, as a share of its mean.
DAMPING = 0.01
#: Columns whose mask is chosen at once, when all before them have been made up for.
BLOCK = 128


def prune(
    weight: torch.Tensor, factor: torch.Tensor, sparsity: float, n_m: tuple[int, int] | None = None
) -> torch.Tensor:
    """Returns the matrix with the `sparsity` share of each block of columns set to zero and the rest corrected.

    A weight counts by the least error that is left when it goes: w² over its entry of the inverse Hessian.

    Args:
        weight: [out_features, in_features].
        factor: upper Cholesky factor of the inverse of the damped Hessian of the inputs, float32 [in, in]; see
            `trimtab.runtime.rounding.hessian.inverse_factor`.
        sparsity: share of zeros, 0 to 1.
        n_m: keep n of each m weights along a row instead; m divides in_features.

    Returns:
        float32 [out_features, in_features].
    """
    weight = weight.float().t().contiguous()  # columns as rows: all that follows goes through them one by one
    columns, cost = len(weight), factor.diagonal().square()[:, None]
    m = n_m[1] if n_m else 1
    size = max(BLOCK // m, 1) * m
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        block, upper, spread = weight[begin:end], factor[begin:end, begin:end], cost[begin:end]
        errors = torch.empty_like(block)
        if n_m is None:
            gone = mask.lowest((block.square() / spread).reshape(1, -1), sparsity).reshape(block.shape)
        else:
            gone = torch.empty_like(block, dtype=torch.bool)
        for i in range(end - begin):
            if n_m and i % m == 0:
                scores = block[i : i + m].square() / spread[i : i + m]
                gone[i : i + m] = mask.n_of_m(scores.t(), *n_m).t()
            lost = block[i] * gone[i]
            block[i] -= lost
            errors[i] = lost / upper[i, i]
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        weight[end:] -= factor[begin:end, end:].t() @ errors
    return weight.t().contiguous()
