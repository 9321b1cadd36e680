"""An attempt beside the unchanged model: on the same items and windows, with speeds of the same minutes if there are.

The baseline's own row shows its first look alone. What an attempt is compared with is in its verdict (`beside`), so
that a ratio on a page is the ratio of the two numbers that stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.judge import Beside, Interval, Measurements, Verdict
from trimtab.recipe import Acceptance
from trimtab.report.rows import DASH, interval_text, number

#: Of a model that was scored block by block.
UNMEASURED = "not measured: block by block"


@dataclass(frozen=True)
class Line:
    """One thing that was measured of both: its name with the unit, the two numbers, and how they differ."""

    what: str
    ours: str
    theirs: str
    change: str


def baseline_of(verdict: Verdict, baseline: Verdict | None) -> tuple[Interval | None, float | None, Measurements]:
    """Returns accuracy, perplexity and measurements of the unchanged model that an attempt is compared with.

    Args:
        baseline: the verdict on the baseline itself: its measurements stand in where none were made beside the attempt,
            but not what it scored, which is of other items.
    """
    beside = verdict.beside or Beside()
    measurements = beside.measurements or (baseline.measurements if baseline else Measurements())
    return beside.accuracy, beside.perplexity, measurements


def measured(verdict: Verdict, baseline: Verdict | None) -> list[Line]:
    """Returns everything that the engine measured of an attempt; a dash for what is unknown, and of a baseline that was
    scored block by block why."""
    if not verdict.measurements.bytes and verdict.perplexity is None:
        return []
    _, perplexity, theirs = baseline_of(verdict, baseline)
    lines = _costs(verdict.measurements, theirs, bool(baseline))
    if verdict.perplexity or perplexity:
        lines.append(_line("perplexity", verdict.perplexity, perplexity))
    return lines


def bought(verdict: Verdict, baseline: Verdict | None) -> list[Line]:
    """Returns what an attempt costs to serve, beside the unchanged model."""
    if not verdict.measurements.bytes:
        return []
    return _costs(verdict.measurements, baseline_of(verdict, baseline)[2], bool(baseline))


def kept(verdict: Verdict, accept: Acceptance) -> list[tuple[str, str, str, str, str]]:
    """Returns (what, unchanged, this model, what is left with its interval, limit) of the two criteria."""
    if not (verdict.recovery and verdict.perplexity_ratio):
        return []
    accuracy, perplexity, _ = baseline_of(verdict, None)
    return [
        (
            f"right answers to {verdict.items:,} items",
            interval_text(accuracy),
            interval_text(verdict.accuracy),
            interval_text(verdict.recovery),
            f"at least {accept.min_recovery:g}",
        ),
        (
            f"perplexity of {verdict.windows:,} windows",
            number(perplexity),
            number(verdict.perplexity),
            interval_text(verdict.perplexity_ratio),
            f"at most {accept.max_perplexity_ratio:g}",
        ),
    ]


def _costs(ours: Measurements, theirs: Measurements, is_compared: bool) -> list[Line]:
    pairs = (
        ("size, MB", ours.bytes / 1e6, theirs.bytes / 1e6),
        ("decode at batch 1, tokens/s", ours.decode_tokens_per_second, theirs.decode_tokens_per_second),
        (
            f"throughput at batch {_both(ours.batch, theirs.batch)}, tokens/s",
            ours.throughput_tokens_per_second,
            theirs.throughput_tokens_per_second,
        ),
        ("peak memory, MB", ours.peak_memory_bytes / 1e6, theirs.peak_memory_bytes / 1e6),
        ("longest context that fits, tokens", ours.max_context_tokens, theirs.max_context_tokens),
    )
    found = [_line(*pair) for pair in pairs if pair[1] or pair[2]]
    if theirs.by_block:
        found = [replace(line, theirs=UNMEASURED) if line.theirs == DASH else line for line in found]
    if ours.devices != 1 or theirs.devices != 1:
        devices = number(theirs.devices) if is_compared else DASH
        found.append(Line("devices of one copy", number(ours.devices), devices, DASH))
    if ours.bytes:
        share = f"{100 * ours.quantized_share:.1f}"
        found.insert(1, Line("quantized tensors, % of their BF16 bytes", share, DASH, DASH))
    return found


def _line(what: str, ours: float | None, theirs: float | None) -> Line:
    change = f"{ours / theirs - 1:+.1%}".replace("%", " %") if ours and theirs else DASH
    return Line(what, number(ours or None), number(theirs or None), change)


def _both(ours: int, theirs: int) -> str:
    return f"{ours}" if ours == theirs else f"{ours} (baseline {theirs})"
