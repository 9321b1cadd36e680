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
    return _damped(gram, damping)[1]


def solve(gram: torch.Tensor, damping: float, right: torch.Tensor) -> torch.Tensor:
    """Returns the matrix whose product with the damped one is `right`, float32 [out, in].

    Args:
        gram, damping: as for `inverse_factor`.
        right: float32 [out, in].

    Raises:
        Failure: `unsupported`, as `inverse_factor`.
    """
    return torch.cholesky_solve(right.t(), _damped(gram, damping)[0]).t()


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the damped matrix itself, float32 [in, in].

    Args:
        gram, damping: as for `inverse_factor`; it need not be invertible.
    """
    found = gram.clone()
    found.diagonal().add_(_added(gram, damping))
    return found


def _added(gram: torch.Tensor, damping: float) -> torch.Tensor:
    return damping * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _damped(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower Cholesky factor of the damped matrix, and the upper one of its inverse."""
    added = _added(gram, damping)
    for _ in range(10):
        matrix = gram.clone()
        matrix.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return lower, upper
        added = added * 10
    raise Failure("unsupported", "the second moments of a layer's input cannot be inverted; calibrate on more text")
