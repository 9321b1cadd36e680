"""Weight scales: from the largest weight of a block, or searched for the least error that matters.

A block is the weights that share a scale: some of a row (INT4, FP4), a row (INT8, FP8 per channel) or a whole
matrix (FP8). The search tries scales around the largest weight's, of those that can be stored, and keeps for each
block the one with the least squared error, each weight's error counted by the second moment of its input: the expected
squared error that the block adds to its output, when inputs are taken as uncorrelated; or, with the second moments of
all pairs of its inputs, when only those of other blocks are. Counted by nothing, the error would choose worse scales
than the largest weight does: SmolLM2-135M's perplexity in NVFP4 was 43.3 so, 41.8 by the largest weight, 37.5 by
weighted errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.runtime.checkpoint.few_bits import E2M1_MAX, E4M3_MAX, round_e2m1

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
    """What a scale multiplies: its type in `catalog.numbers.NUMBERS`, the largest number, how a quotient is rounded to
    one, the type that scales have."""

    type: str
    largest: float
    round: Callable[[torch.Tensor], torch.Tensor]
    scale_dtype: torch.dtype = torch.float32

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns `scale_of` the largest weight."""
        return scale_of(amax, self.largest)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns a scale as it is stored and read back, float32."""
        return scale.to(self.scale_dtype).float()

    def code(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a scale in a checkpoint."""
        return scale.to(self.scale_dtype)

    def candidates(self, amax: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields scales to try, as they are read back, for blocks with these largest magnitudes; the first is taken
        where nothing tells them apart."""
        for ratio in RATIOS:
            yield self.stored(self.scale(amax * ratio))


@dataclass(frozen=True)
class Nvfp4(Numbers):
    """E2M1 under an e4m3 scale in units of `unit`, a float32 scalar that the layers of one input share.

    The scale of the largest weight is ModelOpt's (NVFP4QTensor, 0.47), the smallest e4m3 for a block that is smaller.
    The search goes by codes, which ascend as their numbers do: eight down, an octave, and six up, where the largest
    weight becomes 4 instead of 6 (Cook et al. 2025, "Four Over Six", arXiv 2512.02010) and a little more.
    """

    unit: torch.Tensor | float = 1.0
    STEPS: ClassVar = sorted(range(-8, 7), key=abs)

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        return self._of_largest(amax).float() * self.unit

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return self.code(scale).float() * self.unit

    def code(self, scale: torch.Tensor) -> torch.Tensor:
        return (scale / self.unit).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)

    def candidates(self, amax: torch.Tensor) -> Iterator[torch.Tensor]:
        codes = self._of_largest(amax).view(torch.uint8).int()
        for step in self.STEPS:
            found = (codes + step).clamp(1, 126).to(torch.uint8)  # 126 is 448, and 127 no number
            yield found.view(torch.float8_e4m3fn).float() * self.unit

    def _of_largest(self, amax: torch.Tensor) -> torch.Tensor:
        quotient = amax.float() / (self.largest * self.unit)
        return torch.where(quotient == 0, 1.0, quotient).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Mxfp4(Numbers):
    """E2M1 under a power of two, which for the largest weight is the least that clips nothing, as ModelOpt's is."""

    STEPS: ClassVar = sorted(range(-2, 2), key=abs)

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        return torch.exp2(self._exponent(amax))

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return torch.exp2(torch.log2(scale).round_())

    def code(self, scale: torch.Tensor) -> torch.Tensor:
        return (torch.log2(scale).round_() + 127).to(torch.uint8)

    def candidates(self, amax: torch.Tensor) -> Iterator[torch.Tensor]:
        exponent = self._exponent(amax)
        for step in self.STEPS:
            yield torch.exp2((exponent + step).clamp_(-126, 127))

    def _exponent(self, amax: torch.Tensor) -> torch.Tensor:
        return torch.log2(amax.float() / self.largest).ceil_().clamp_(-126, 127)


INT4 = Numbers("int4", 7, lambda x: x.round().clamp_(-8, 7), torch.bfloat16)
INT8 = Numbers("int8", 127, lambda x: x.round().clamp_(-127, 127))
FP8 = Numbers("e4m3", E4M3_MAX, lambda x: x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float())
#: As if scales of blocks were not rounded themselves: to compare channel scales by.
E2M1 = Numbers("e2m1", E2M1_MAX, round_e2m1)
MXFP4 = Mxfp4("e2m1", E2M1_MAX, round_e2m1)


def nvfp4(amax: torch.Tensor) -> Nvfp4:
    """Returns the numbers of layers that share a unit, by the largest magnitude in any of them, a scalar."""
    return Nvfp4("e2m1", E2M1_MAX, round_e2m1, unit=scale_of(amax, E2M1_MAX * E4M3_MAX))


def from_maximum(blocks: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """Returns each block's scale from its largest weight: float32 [..., n] -> [...].

    It is not rounded as it will be stored, so that round to nearest is ModelOpt's, number for number.
    """
    return numbers.scale(blocks.abs().amax(-1))


def searched(blocks: torch.Tensor, numbers: Numbers, importance: torch.Tensor) -> torch.Tensor:
    """Returns each block's scale of least weighted error: float32 [..., n] -> [...].

    Args:
        blocks: the weights, a block along the last axis.
        importance: what a squared error counts, [n] or [blocks, n]; or what the product of two errors of a block
            counts, [blocks, n, n].
    """
    amax = blocks.abs().amax(-1)
    best, least = torch.ones_like(amax), torch.full_like(amax, torch.inf)
    pairs = importance.dim() == 3
    for scale in numbers.candidates(amax):
        if pairs:
            error = _pair_errors(blocks, scale[..., None], numbers, importance)
        else:
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
    candidates = list(numbers.candidates(amax))
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for part in parts:
        errors += torch.stack([_errors(part, scale, numbers, importance).sum() for scale in candidates]).cpu()
    return candidates[int(errors.argmin())]


def _errors(
    weights: torch.Tensor, scale: torch.Tensor, numbers: Numbers, importance: torch.Tensor
) -> torch.Tensor:
    return numbers.round(weights / scale).mul_(scale).sub_(weights).square_().mul_(importance)


def _pair_errors(
    blocks: torch.Tensor, scale: torch.Tensor, numbers: Numbers, moments: torch.Tensor
) -> torch.Tensor:
    """The error of each block's output, [rows, blocks], by the moments of pairs of its inputs, [blocks, n, n]."""
    errors_BRN = numbers.round(blocks / scale).mul_(scale).sub_(blocks).transpose(0, 1)
    return torch.bmm(errors_BRN, moments).mul_(errors_BRN).sum(-1).t()
