"""What a layer reads, as the product of its format sees it: rounded, at a static scale or at one for each token."""

from __future__ import annotations

import functools

import torch

from trimtab.catalog.formats import Inputs
from trimtab.catalog.numbers import NUMBERS
from trimtab.runtime.checkpoint import few_bits
from trimtab.runtime.checkpoint.few_bits import E4M3_MAX, IN_UNITS
from trimtab.runtime.rounding import scales

#: Numbers that a thread of a CPU rounds at once: of the ten steps or so, in float32, each finds them in the cache.
AT_ONCE = 192 << 10


def static_scale(inputs: Inputs, largest: torch.Tensor) -> torch.Tensor:
    """Returns the scale, a float32 scalar, at which inputs of this largest magnitude are rounded."""
    room = E4M3_MAX if inputs.block else 1  # a block's own scale is e4m3
    return scales.scale_of(largest, NUMBERS[inputs.numbers].largest * room)


def token_scales(x_RI: torch.Tensor, largest: float = E4M3_MAX) -> torch.Tensor:
    """Returns for each row the scale that makes its largest value the largest number, e4m3's, float32 [R, 1]."""
    if x_RI.device.type == "cpu":  # whose norm takes six times as long
        largest_R1 = few_bits.largest(x_RI).float()
    else:  # in one pass
        largest_R1 = torch.linalg.vector_norm(x_RI, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    return largest_R1.div_(largest).clamp_min_(1e-12)


def look_up_table(inputs: Inputs, scale: torch.Tensor) -> torch.Tensor:
    """Returns what a static scale makes of every bfloat16, by its bits: what the product sees in units of the scale, or
    the scale of a block with that largest magnitude, bfloat16 [65536].

    One look-up takes the place of ten steps, each of which costs more than its work where rows are few.
    """
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    units = few_bits.nvfp4_block_scales if inputs.block else IN_UNITS[inputs.numbers]
    return units(every, scale).bfloat16()


def in_units(
    inputs: Inputs,
    x_RI: torch.Tensor,
    scale: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    kind: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the product sees in units of a scale, of type `kind`, and that scale, float32: one for all, or
    [..., 1].

    Such numbers are exact in bfloat16, which would round their products with the scale.

    Args:
        x_RI: floating point [..., in].
        scale: a static one, of one number; that of the largest magnitude in `x_RI` if absent.
        table: `look_up_table` of the static scale, for inputs in bfloat16.
        kind: bfloat16, or float32 where that is what multiplies them.
    """
    if inputs.scale == "token":
        scale = token_scales(x_RI, NUMBERS[inputs.numbers].largest)
    elif scale is None:
        scale = static_scale(inputs, x_RI.abs().max().float())
    units = IN_UNITS[inputs.numbers]
    if table is not None and x_RI.dtype == torch.bfloat16:
        look_up = functools.partial(_look_up, table)
        units = functools.partial(units, block_scales=look_up) if inputs.block else look_up
    columns = x_RI.shape[-1]
    at_once = max(1, AT_ONCE * torch.get_num_threads() // columns)
    if x_RI.device.type != "cpu" or x_RI.numel() <= at_once * columns:
        return units(x_RI, scale).to(kind), scale
    found_RI = torch.empty(x_RI.shape, dtype=kind)
    parts = [each_RI.flatten(0, -2).split(at_once) for each_RI in (found_RI, x_RI)]
    of_parts = scale.flatten(0, -2).split(at_once) if inputs.scale == "token" else [scale] * len(parts[0])
    for part_RI, rows_RI, of_rows in zip(*parts, of_parts, strict=True):
        part_RI.copy_(units(rows_RI, of_rows))
    return found_RI, scale


def _look_up(table: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, x.view(torch.uint16).int().flatten()).view(x.shape)


def rounded(inputs: Inputs | None, x_RI: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Returns what the product sees, float32; where the format does not round its inputs, these themselves.

    Args: as of `in_units`.
    """
    if inputs is None:
        return x_RI
    numbers_RI, scale = in_units(inputs, x_RI, scale, kind=torch.float32)
    return numbers_RI.mul_(scale)
