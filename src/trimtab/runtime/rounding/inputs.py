"""What a layer reads, as the product of its format sees it: rounded, at a static scale or at one for each token."""

from __future__ import annotations

import itertools

import torch

from trimtab.catalog.formats import Inputs
from trimtab.catalog.numbers import NUMBERS
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import E4M3_MAX, IN_UNITS
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
        largest_R1 = layer_layout.largest(x_RI).float()
    else:  # in one pass
        largest_R1 = torch.linalg.vector_norm(x_RI, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest_R1.div_(largest).clamp_min_(1e-12)


def in_units(
    inputs: Inputs, x_RI: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the product sees in units of a scale, and that scale: one for all, or each token's [..., 1], float32.

    The numbers are bfloat16, which holds all of them; it would round their products with the scale.

    Args:
        x_RI: floating point [..., in].
        scale: a static one, of one number; that of the largest magnitude in `x_RI` if absent.
    """
    if inputs.scale == "token":
        scale = token_scales(x_RI, NUMBERS[inputs.numbers].largest)
    elif scale is None:
        scale = static_scale(inputs, x_RI.abs().max().float())
    columns = x_RI.shape[-1]
    at_once = max(1, AT_ONCE * torch.get_num_threads() // columns)
    if x_RI.device.type != "cpu" or x_RI.numel() <= at_once * columns:
        return IN_UNITS[inputs.numbers](x_RI, scale).bfloat16(), scale
    found_RI = torch.empty(x_RI.shape, dtype=torch.bfloat16)
    parts = [each.flatten(0, -2).split(at_once) for each in (found_RI, x_RI)]
    scales_of_parts = scale.flatten(0, -2).split(at_once) if scale.dim() > 1 else itertools.repeat(scale)
    for part_RI, rows_RI, of_rows in zip(*parts, scales_of_parts, strict=False):
        part_RI.copy_(IN_UNITS[inputs.numbers](rows_RI, of_rows))
    return found_RI, scale


def table(inputs: Inputs, scale: torch.Tensor) -> torch.Tensor:
    """Returns every bfloat16, by its bits, in units of a static scale as the product sees it, bfloat16 [65536]."""
    bits = torch.arange(1 << 16, dtype=torch.int32, device=scale.device).to(torch.int16)
    return IN_UNITS[inputs.numbers](bits.view(torch.bfloat16), scale).bfloat16()


def looked_up(x_RI: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns bfloat16 x in units of the scale that a table was made for."""
    return table.index_select(0, x_RI.view(torch.uint16).int().flatten()).view_as(x_RI)


def rounded(inputs: Inputs | None, x_RI: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Returns what the product sees, float32; where the format does not round its inputs, these themselves.

    Args: as of `in_units`.
    """
    if inputs is None:
        return x_RI
    numbers_RI, scale = in_units(inputs, x_RI, scale)
    return numbers_RI.float().mul_(scale)
