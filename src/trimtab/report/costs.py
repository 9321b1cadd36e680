"""What a run cost and what its artifact saves, in rows and sentences: the ledger."""

from __future__ import annotations

import math

from trimtab.loop import ledger
from trimtab.loop.ledger import Ledger, Savings
from trimtab.loop.state import State
from trimtab.report.rows import DASH, number, one_line
from trimtab.report.story import accepted

#: Headings of `rows`: hours on the clock, of all GPUs, of all busy cores, and money.
COLUMNS = ("what", "hours", "GPU hours", "CPU hours", "cost")
_WORDS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def rows(state: State) -> list[tuple[str, ...]]:
    """Returns the cells of `COLUMNS`: the baseline, each attempt, each stage over all of them, and the whole run."""
    whole = ledger.ledger(state)
    names = ["baseline", *(f"{n}: {one_line(brief.recipe.title)}" for n, brief in enumerate(state.history, start=1))]
    parts = [(name, whole.of(number)) for number, name in enumerate(names)]
    stages = dict.fromkeys(line.stage for line in whole.lines)
    parts += [(f"all {stage}", Ledger(_of_stage(whole, stage), whole.currency)) for stage in stages]
    shown = [(name, part) for name, part in parts if any(line.seconds for line in part.lines)]
    return [_row(name, part) for name, part in [*shown, ("the whole run", whole)]] if shown else []


def _of_stage(whole: Ledger, stage: str) -> tuple[ledger.Line, ...]:
    return tuple(line for line in whole.lines if line.stage == stage)


def _row(name: str, part: Ledger) -> tuple[str, ...]:
    hours = sum(line.seconds for line in part.lines) / ledger.HOUR
    return name, _hours(hours), _hours(part.gpu_hours), _hours(part.cpu_hours), money(part.cost, part.currency)


def _hours(value: float) -> str:
    return f"{value:.3f}" if value < 10 else number(value)


def money(value: float | None, currency: str) -> str:
    """Writes an amount with two digits, more below a tenth."""
    if value is None:
        return DASH
    return f"{value:,.2f} {currency}" if value >= 0.1 or value == 0 else f"{value:.2g} {currency}"


def spent_text(state: State) -> str:
    """Returns what the run took, in a sentence; "" where nothing was done, or not measured."""
    whole = ledger.ledger(state)
    both = ((whole.gpu_hours, "GPU hours"), (whole.cpu_hours, "CPU hours"))
    told = [f"{_hours(value)} {unit}" for value, unit in both if value]
    if not told:
        return ""
    cost = "" if whole.cost is None else f", which is {money(whole.cost, whole.currency)}"
    return f"The run took {' and '.join(told)}{cost}."


def savings_text(state: State) -> str:
    """Returns what a million tokens costs before and after, in a sentence; "" where nothing is accepted or measured."""
    found = accepted(state)
    saved = ledger.savings(state, found[1]) if found else None
    if saved is None:
        return ""
    if saved.before_cost is None:
        unit = "GPU hours" if state.target != "cpu" else "core hours"
        before, after = f"{saved.before_hours:.3g}", f"{saved.after_hours:.3g} {unit}"
    else:
        currency = state.prices.currency
        before, after = money(saved.before_cost, currency), money(saved.after_cost, currency)
    told = f"A million tokens of answers, at the batch that was measured, takes {before} unchanged and {after} now"
    return f"{told}." if saved.tokens_to_pay is None else f"{told}; {_paid(saved)}."


def _paid(saved: Savings) -> str:
    if math.isinf(saved.tokens_to_pay):
        return "nothing is saved, so the run never pays for itself"
    return f"the run has paid for itself after {tokens(saved.tokens_to_pay)} tokens"


def tokens(count: float) -> str:
    """Writes a number of tokens in words: '17 million'."""
    for size, word in _WORDS:
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:.0f}"


def sentences(state: State) -> list[str]:
    """Returns what is told of the ledger."""
    return [told for told in (spent_text(state), savings_text(state)) if told]
