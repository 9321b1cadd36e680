"""Rungs of mixed precision that would cost minutes to fail, and are skipped.

As bits grow, the logarithm of the perplexity ratio falls about geometrically, so log(log ratio) is fitted as a line in
the bits of the measured recipes; one measurement is extrapolated with `HALVING_BITS`. SmolLM2-135M, on 20 windows of
trimtab's own text, had 1.109 in INT4 GPTQ and 1.054 mixed at 5 bits: log ratio 0.104 to 0.053, halved in one bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.catalog.formats import FORMATS, WeightFormat
from trimtab.loop.adjust.comparison import bits_of, quantization
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import Recipe

#: With one measurement: the bits that halve the log ratio.
HALVING_BITS = 1.0
#: A rung is skipped when its predicted log ratio exceeds this multiple of the limit's. Acceptance wants the
#: whole interval below the limit, so a prediction at the limit itself already fails more often than not.
CLEARLY = 1.1


def predicted_ratio(recipe: Recipe, history: Sequence[Brief]) -> float | None:
    """Returns the perplexity ratio to expect of a `mixed` recipe, from attempts that differ in bits alone.

    What it mixes first is its end at the fewest bits, such as INT4 by GPTQ; what is stored alike, AWQ and then rounding
    to nearest, stands in where that was not measured. None when nothing was measured.
    """
    mix = quantization(recipe).row
    if not mix.mixes:
        return None
    fewest = _fewest(mix)
    points: dict[str, tuple[float, float]] = {}
    for brief in history:
        quantize, ratio = quantization(brief.recipe), brief.verdict.perplexity_ratio
        same = (brief.recipe.prune, brief.recipe.distill) == (recipe.prune, recipe.distill)
        on_the_line = quantize.row == mix or (quantize.format in fewest and not quantize.method)
        if same and on_the_line and ratio and ratio.estimate > 1:
            key = brief.recipe.digest if quantize.row.mixes else quantize.format
            points[key] = (bits_of(brief.recipe), math.log(math.log(ratio.estimate)))
    measured = [form for form in fewest if form in points]
    for worse in measured[1:]:
        points.pop(worse)
    if not points:
        return None
    bits = recipe.quantize.effective_bits
    at, value = max(points.values())
    slope = -math.log(2) / HALVING_BITS
    if len({x for x, _ in points.values()}) > 1:
        n = len(points)
        mean_x = sum(x for x, _ in points.values()) / n
        mean_y = sum(y for _, y in points.values()) / n
        fitted = sum((x - mean_x) * (y - mean_y) for x, y in points.values())
        fitted /= sum((x - mean_x) ** 2 for x, _ in points.values())
        if fitted < 0:  # else noise outweighs the trend, and the guess stands
            slope, at, value = fitted, mean_x, mean_y
    return math.exp(math.exp(value + slope * (bits - at)))


def _fewest(mix: WeightFormat) -> list[str]:
    """What ends the line of a mix at its fewest bits: what it mixes, and what is stored alike, the nearest first."""
    alike = (name for name, row in FORMATS.items() if row.storage == mix.parts[0].storage)
    return sorted(alike, key=lambda name: FORMATS[name].harshness)


def skip(
    allowed: Sequence[Rung], ladder: Sequence[Rung], history: Sequence[Brief]
) -> tuple[Rung | None, str]:
    """Returns the first allowed rung that is not predicted to fail clearly, and a note on those before it.

    The last rung of the ladder, and the last that is allowed, are never skipped.
    """
    skipped = []
    for rung in allowed:
        ratio = predicted_ratio(rung.recipe, history)
        limit = rung.recipe.accept.max_perplexity_ratio
        hopeless = ratio is not None and math.log(ratio) > CLEARLY * math.log(limit)
        if not hopeless or rung is ladder[-1] or rung is allowed[-1]:
            note = f"; skipped on the way, with the perplexity ratios predicted: {', '.join(skipped)}"
            return rung, note if skipped else ""
        skipped.append(f"{rung.recipe.title} {ratio:.2f}")
    return None, ""
