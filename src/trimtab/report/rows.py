"""The table of a run as data, and how its numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.judge import Interval, Verdict
from trimtab.loop.state import Brief, State

DASH = "–"

#: Field of `AttemptRow` → its heading, unit included; the order is that of every table.
COLUMNS = {
    "what": "recipe",
    "accuracy": "accuracy",
    "recovery": "recovery",
    "perplexity_ratio": "perplexity ratio",
    "megabytes": "MB",
    "share": "% of BF16",
    "decode": "tokens/s",
    "peak_megabytes": "peak MB",
    "seconds": "seconds",
    "verdict": "verdict",
    "reason": "reason",
}
INTERVALS = ("accuracy", "recovery", "perplexity_ratio")


@dataclass(frozen=True)
class AttemptRow:
    """One line of the table; None is a value that was not measured.

    Sizes in MB (10^6 bytes); `share` is the bytes of the quantized tensors over their bytes in BF16; `decode`
    in tokens a second at batch 1; `seconds` of all stages together, without those found in the store; `same_items`
    says what the baseline has on the items of the accuracy; `detail` the failure class, or "confirmed".
    """

    number: int
    what: str
    outcome: str
    accepted: bool
    accuracy: Interval | None
    recovery: Interval | None
    perplexity_ratio: Interval | None
    megabytes: float | None
    share: float | None
    decode: float | None
    peak_megabytes: float | None
    seconds: float | None
    same_items: str
    detail: str
    reason: str

    @property
    def label(self) -> str:
        """'baseline', or the attempt's number."""
        return str(self.number) if self.number else "baseline"

    @property
    def verdict(self) -> str:
        """'rejected: perplexity', 'accepted, confirmed', 'baseline'."""
        return f"{self.outcome}{', ' if self.accepted else ': '}{self.detail}" if self.detail else self.outcome

    @property
    def cells(self) -> dict[str, tuple[str, str]]:
        """Returns for each of COLUMNS the text, and what stands below it: the interval, or nothing; behind a semicolon
        what else."""
        texts = {name: interval_texts(getattr(self, name)) for name in INTERVALS}
        if self.same_items:
            texts["accuracy"] = (texts["accuracy"][0], f"{texts['accuracy'][1]}; {self.same_items}")
        numbers = {
            "megabytes": number(self.megabytes),
            "share": number(None if self.share is None else 100 * self.share),
            "decode": number(self.decode),
            "peak_megabytes": number(self.peak_megabytes),
            "seconds": spent(self.seconds),
            "what": self.what,
            "verdict": self.verdict,
            "reason": self.reason or DASH,
        }
        texts |= {name: (text, "") for name, text in numbers.items()}
        return {name: texts[name] for name in COLUMNS}


def rows(state: State) -> list[AttemptRow]:
    """Returns the baseline, when it was measured, and each attempt in order; the accepted one is marked."""
    found = [_row(0, state.baseline)] if state.baseline else []
    return found + [_row(place, brief) for place, brief in enumerate(state.history, start=1)]


def _row(place: int, brief: Brief) -> AttemptRow:
    verdict, measured = brief.verdict, brief.verdict.measurements
    return AttemptRow(
        number=place,
        what=one_line(brief.recipe.title),
        outcome=verdict.outcome,
        accepted=verdict.outcome == "accepted",
        accuracy=verdict.accuracy,
        recovery=verdict.recovery,
        perplexity_ratio=verdict.perplexity_ratio,
        megabytes=measured.bytes / 1e6 or None,
        share=measured.quantized_share if measured.bytes else None,
        decode=measured.decode_tokens_per_second or None,
        peak_megabytes=measured.peak_memory_bytes / 1e6 or None,
        seconds=sum(brief.seconds.values()) if brief.seconds else None,
        same_items=same_items(verdict),
        detail=verdict.failure_class or ("confirmed" if verdict.confirmed else ""),
        reason=one_line(verdict.reason),
    )


def same_items(verdict: Verdict) -> str:
    """Returns 'baseline 0.813', what the unchanged model has on the items of an attempt; '' where that is unknown."""
    accuracy = verdict.beside.accuracy if verdict.beside else None
    return f"baseline {fraction(accuracy.estimate)}" if accuracy and verdict.accuracy else ""


def number(value: float | None) -> str:
    """Writes a number with three significant digits, or as a whole number from 100 on."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 or size == 0 else 2}f}"


def spent(seconds: float | None) -> str:
    """Writes a duration in seconds: whole ones from 10 on."""
    return number(seconds) if seconds is None or seconds >= 99.5 else f"{seconds:.{0 if seconds >= 9.95 else 1}f}"


def fraction(value: float | None) -> str:
    """Writes an accuracy, a recovery or a ratio with three decimals, fewer from 10 on."""
    if value is None or not math.isfinite(value) or abs(value) >= 10:
        return number(value)
    return f"{value:.3f}"


def interval_texts(interval: Interval | None) -> tuple[str, str]:
    """Returns the estimate and 'low to high'."""
    if interval is None:
        return DASH, ""
    return fraction(interval.estimate), f"{fraction(interval.low)} to {fraction(interval.high)}"


def interval_text(interval: Interval | None) -> str:
    """Returns '0.981 (0.957 to 1.005)', or a dash."""
    estimate, ends = interval_texts(interval)
    return f"{estimate} ({ends})" if ends else estimate


def one_line(text: str) -> str:
    """Replaces what would break a line, move a cursor or steer a terminal by single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
