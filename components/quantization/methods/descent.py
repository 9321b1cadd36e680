"""Coordinate descent on what GPTQ leaves: each scale, and each weight, again as good as it can be given all others.

GPTQ rounds a weight once, before those behind it, and with scales that nearest rounding would choose. Going through
them again, each takes the value that leaves the least error of the layer's output: a weight as in Behdin et al. 2023,
"QuantEase: Optimization-based Quantization for Language Models" (arXiv 2309.01885), a scale by least squares as in
Zhang et al. 2024, "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization" (arXiv 2403.07134). No step
makes the error larger.
"""

from __future__ import annotations

import torch

from trimtab.components.quantization.methods import columns, gptq
from trimtab.runtime.rounding import hessian
from trimtab.runtime.rounding.scales import Numbers


def descend(
    weight: torch.Tensor,
    rounded: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    numbers: Numbers,
    damping: float = gptq.DAMPING,
    sweeps: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rounded weights, float32 [out, in], and scales, float32 [out, groups], of less error.

    Args:
        weight, gram, numbers, damping: as for `gptq.round_weights`.
        rounded: what that returned, float32 [out, in].
        scale: of groups of a row, float32 [out, groups]; where a row has one alone, it stays.
        sweeps: how often all weights are gone through.
    """
    gram = hessian.damped(gram, damping)
    # Columns as rows, as in `gptq`.
    rounded_IR, scale_GR = rounded.t().contiguous(), scale.t().contiguous()
    error_IR = rounded_IR - weight.t()
    groups = len(scale_GR)
    step = len(gram) // groups if groups > 1 else gptq.BLOCK
    for _ in range(sweeps):
        for number, begin in enumerate(range(0, len(gram), step)):
            part = slice(begin, begin + step)
            here, slope_IR = gram[part, part], gram[part] @ error_IR
            units_R = scale_GR[number if groups > 1 else 0]
            if groups > 1:
                found_R = _rescaled(rounded_IR[part], units_R, here, slope_IR, numbers)
                moved_IR = rounded_IR[part] * (found_R / units_R - 1)
                rounded_IR[part] += moved_IR
                error_IR[part] += moved_IR
                slope_IR += here @ moved_IR
                scale_GR[number] = units_R = found_R
            curve_I1 = here.diagonal()[:, None]
            best_IR = rounded_IR[part] - slope_IR / curve_I1
            passed_on_II = -here / curve_I1.t()
            given = (best_IR, units_R.expand_as(best_IR), passed_on_II, numbers, rounded_IR[part])
            rounded_IR[part], moved_IR = columns.in_turn(*given)
            error_IR[part] += moved_IR
    return rounded_IR.t(), scale_GR.t()


def _rescaled(
    rounded_IR: torch.Tensor, scale_R: torch.Tensor, gram: torch.Tensor, slope_IR: torch.Tensor, numbers: Numbers
) -> torch.Tensor:
    """Returns the scales, of those that can be stored, at which a group's numbers err less than at theirs: [R]."""
    codes_IR = rounded_IR / scale_R
    curve_R = (codes_IR * (gram @ codes_IR)).sum(0)
    best_R = scale_R - (codes_IR * slope_IR).sum(0) / curve_R
    found_R = numbers.stored(best_R.clamp_min(torch.finfo(torch.float32).tiny * 2**24))
    # The error is a parabola in the scale, so of two the nearer to its bottom is the better.
    better_R = (found_R - best_R).abs() < (scale_R - best_R).abs()
    return torch.where(better_R & (curve_R > 0) & (best_R > 0), found_R, scale_R)
