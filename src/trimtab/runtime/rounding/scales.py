"""Weight scales: from the largest weight of a block, or searched for the least error that matters.

A block is the weights that share a scale: a group of a row (INT4), a row (INT8, FP8 per channel) or a whole
matrix (FP8). The search tries scales around the largest weight's and keeps, for each block, the one with the
least squared error, each weight's error counted by the second moment of its input: the expected squared error
that the block adds to its output, when inputs are taken as uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from trimtab.runtime.checkpoint.layer_layout import E4M3_MAX

#: Candidates as shares of the scale that the largest weight asks for: clipping it may pay, and so may a little room.
RATIOS = torch.linspace(1.15, 0.5, 40).tolist()


def scale_of(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Returns the scale, float32, with which `amax` becomes the largest number; 1 where all is zero.

    A smaller one would be zero in float16, and would clip to nothing whatever comes after all.
    """
    scale = (amax.float() / largest).clamp_min(torch.finfo(torch.float32).tiny * 2**24)
    return torch.where(amax == 0, 1.0, scale)


@dataclass(frozen=True)
class Numbers:
    """What a scale multiplies: the largest number, how a quotient is rounded to one, the type that scales have."""

    largest: float
    round: Callable[[torch.Tensor], torch.Tensor]
    scale_dtype: torch.dtype = torch.float32

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns `scale_of` the largest weight."""
        return scale_of(amax, self.largest)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns a scale as it is stored and read back, float32."""
        return scale.to(self.scale_dtype).float()


INT4 = Numbers(7, lambda x: x.round().clamp_(-8, 7), torch.bfloat16)
INT8 = Numbers(127, lambda x: x.round().clamp_(-127, 127))
FP8 = Numbers(E4M3_MAX, lambda x: x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float())


def from_maximum(blocks: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """Returns each block's scale from its largest weight: float32 [..., n] -> [...].

    It is not rounded as it will be stored, so that round to nearest is ModelOpt's, number for number.
    """
    return numbers.scale(blocks.abs().amax(-1))


def searched(blocks: torch.Tensor, numbers: Numbers, importance: torch.Tensor) -> torch.Tensor:
    """Returns each block's scale of least weighted error: float32 [..., n] -> [...].

    Args:
        blocks: the weights, a block along the last axis.
        importance: what a squared error counts, broadcastable to `blocks`.
    """
    amax = blocks.abs().amax(-1)
    best, least = torch.ones_like(amax), torch.full_like(amax, torch.inf)
    for ratio in RATIOS:
        scale = numbers.stored(numbers.scale(amax * ratio))
        error = _errors(blocks, scale[..., None], numbers, importance).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def searched_for_all(
    parts: Iterable[torch.Tensor], amax: torch.Tensor, numbers: Numbers, importance: torch.Tensor
) -> torch.Tensor:
    """Returns the one scale of least weighted error for all of a block that comes in parts, a float32 scalar.

    Args:
        parts: the weights, float32 [rows, in] each.
        amax: the largest magnitude of all.
        importance: what a squared error counts, [in].
    """
    candidates = [numbers.stored(numbers.scale(amax * ratio)) for ratio in RATIOS]
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for part in parts:
        errors += torch.stack([_errors(part, scale, numbers, importance).sum() for scale in candidates]).cpu()
    return candidates[int(errors.argmin())]


def _errors(
    weights: torch.Tensor, scale: torch.Tensor, numbers: Numbers, importance: torch.Tensor
) -> torch.Tensor:
    return numbers.round(weights / scale).mul_(scale).sub_(weights).square_().mul_(importance)
