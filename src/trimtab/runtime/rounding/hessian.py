"""The Hessian of a layer's squared output error, as second-order methods want it: damped, inverted and factored."""

from __future__ import annotations

import torch

from trimtab.base.errors import Failure


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped matrix, float32 [in, in].

    Its rows hold what Gaussian elimination, column by column, needs of the inverse (Frantar et al. 2022, "GPTQ").

    Args:
        gram: mean or sum of x xᵀ over the inputs, float32 [in, in].
        damping: what is added to the diagonal, as a share of its mean. Too few tokens leave the matrix singular; then
            damping grows until it can be factored.

    Raises:
        Failure: `unsupported`, no damping makes it invertible.
    """
    added = damping * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(10):
        damped = gram.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        added = added * 10
    raise Failure("unsupported", "the second moments of a layer's input cannot be inverted; calibrate on more text")
