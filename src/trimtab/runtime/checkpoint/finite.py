"""Whether the numbers of a model are numbers: everything behind one that is not would not be either."""

from __future__ import annotations

import torch

from trimtab.base.errors import InputError


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor of a model that holds NaN or infinity.

    Raises:
        InputError: it does; names it.
    """
    # The extremes are NaN where any number is, and found without a temporary of the tensor's size.
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise InputError(f"model: {name} holds NaN or infinity; download it again, or check how it was trained")
