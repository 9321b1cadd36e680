"""What a layer reads, as the product of its format sees it: rounded, at a static scale or at one for each token."""

from __future__ import annotations

import torch

from trimtab.catalog.formats import Inputs
from trimtab.catalog.numbers import NUMBERS
from trimtab.runtime.checkpoint.layer_layout import E4M3_MAX, ROUNDED
from trimtab.runtime.rounding import scales

#: Numbers that a thread of a CPU rounds at once: of the ten steps or so, in float32, each finds them in the cache.
AT_ONCE = 64 << 10


def static_scale(inputs: Inputs, largest: torch.Tensor) -> torch.Tensor:
    """Returns the scale, a float32 scalar, at which inputs of this largest magnitude are rounded."""
    room = E4M3_MAX if inputs.block else 1  # a block's own scale is e4m3
    return scales.scale_of(largest, NUMBERS[inputs.numbers].largest * room)


def token_scales(x_RI: torch.Tensor, largest: float = E4M3_MAX) -> torch.Tensor:
    """Returns for each row the scale that makes its largest value the largest number, e4m3's, float32 [R, 1]."""
    if x_RI.device.type == "cpu":  # whose norm takes six times as long
        largest_R1 = x_RI.abs().amax(-1, keepdim=True).float()
    else:  # in one pass
        largest_R1 = torch.linalg.vector_norm(x_RI, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest_R1.div_(largest).clamp_min_(1e-12)


def rounded(
    inputs: Inputs | None,
    x_RI: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Returns what the product sees; where the format does not round its inputs, these themselves.

    Args:
        x_RI: floating point [..., in].
        scale: a static one; that of the largest magnitude in `x_RI` if absent.
        dtype: of what was rounded.
    """
    if inputs is None:
        return x_RI
    if inputs.scale != "token" and scale is None:
        scale = static_scale(inputs, x_RI.abs().max().float())
    columns = x_RI.shape[-1]
    at_once = max(1, AT_ONCE * torch.get_num_threads() // columns)
    if x_RI.device.type != "cpu" or x_RI.numel() <= at_once * columns:
        return _rounded(inputs, x_RI, scale).to(dtype)
    found_RI = torch.empty(x_RI.shape, dtype=dtype)
    parts = (each_RI.flatten(0, -2).split(at_once) for each_RI in (x_RI, found_RI))
    for rows_RI, part_RI in zip(*parts, strict=True):
        part_RI.copy_(_rounded(inputs, rows_RI, scale))
    return found_RI


def _rounded(inputs: Inputs, x_RI: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    x_RI = x_RI.float()
    if inputs.scale == "token":
        scale = token_scales(x_RI, NUMBERS[inputs.numbers].largest)
    return ROUNDED[inputs.numbers](x_RI, scale)
