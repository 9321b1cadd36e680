"""What to do next: how to serve what was accepted, or what to try where nothing was. For the report and the command."""

from __future__ import annotations

import math
import shlex

from trimtab.base.errors import TrimtabError
from trimtab.catalog.formats import FORMATS
from trimtab.catalog.goals import GOALS
from trimtab.judge import Measurements, Verdict, gain
from trimtab.loop.ledger import exhausted
from trimtab.loop.state import Brief, State
from trimtab.report.rows import one_line
from trimtab.report.story import accepted, gain_text

#: More items than this are more than most tasks have; a limit is then the thing to think about.
MOST_ITEMS = 50_000
#: What a run may make attempts at most.
MOST_ATTEMPTS = 10
_UNTRIED = "distill: {tokens: 10000000, quantization_aware: true} beside quantize: {format: int4_rtn}"
_BASELINE = {
    "accuracy": "Name more tasks in the evaluation, larger ones, or some that the model can do; or write a lower limit "
    "(accept.min_recovery).",
    "does_not_fit": "The unchanged model itself does not fit: name a larger target, write fewer tokens or requests "
    "into the recipe's engine, or give it more devices (engine: {tensor_parallel_size: 2}).",
    "unsupported": "Name another back end in the recipe (engine: {backend: torch}), or a target that it serves.",
}


def serving(state: State) -> list[str]:
    """Returns commands that take the release and serve it, to copy; [] where nothing is accepted."""
    found = accepted(state)
    if found is None:
        return []
    name, store = shlex.quote(one_line(state.name)), shlex.quote(one_line(state.store))
    backend = found[1].recipe.engine.backend
    lines = [f"trimtab pull {name} served --store {store}", "trimtab serve served --port 8000"]
    if backend != "torch":
        lines.append(f"trimtab serve-config {store}/releases/{name}/VERSION config")
    return lines


def next_steps(state: State) -> list[str]:
    """Returns what to try where nothing is accepted, the likeliest help first; [] where something is."""
    if accepted(state):
        return []
    if state.baseline and state.baseline.verdict.outcome != "baseline":
        why = _BASELINE.get(state.baseline.verdict.failure_class or "")
        return [why or "Mend what the baseline failed for, and run the same command again."]
    if not state.history:
        return ["Run the same command again: it goes on from the stages that were complete."]
    if over := exhausted(state):
        return [f"Write larger limits into the recipe, or a gentler recipe first: {over}.", *_rest(state)]
    return _rest(state)


def _rest(state: State) -> list[str]:
    found = [_more_items(state), *_another_goal(state), _more_attempts(state), _gentler(state), _nearest(state)]
    return [step for step in found if step]


def _more_items(state: State) -> str:
    """Says which number of items would decide an attempt that they could not decide and that stood on the right side.

    An interval narrows with the square root of their number.
    """
    for brief in state.history:
        verdict, accept = brief.verdict, brief.recipe.accept
        if verdict.outcome != "indeterminate" or not (verdict.recovery and verdict.perplexity_ratio):
            continue
        over = verdict.recovery.estimate - accept.min_recovery
        half = verdict.recovery.estimate - verdict.recovery.low
        if over <= 0 or half <= over or verdict.perplexity_ratio.high > accept.max_perplexity_ratio:
            continue
        needed = math.ceil(verdict.items * (half / over) ** 2 / 100) * 100
        if needed <= MOST_ITEMS:
            return (
                f"{_title(brief)} stood on the right side of its limit, and {verdict.items:,} items were too few to "
                f"show it: about {needed:,} would be enough. Write more of them, or more tasks, into an evaluation."
            )
    return ""


def _another_goal(state: State) -> list[str]:
    """Says what an attempt gained elsewhere that was accurate and gained nothing at this goal."""
    for brief in state.history:
        if brief.verdict.failure_class != "no_gain":
            continue
        beside = brief.verdict.beside
        before = beside.measurements if beside and beside.measurements else None
        before = before or (state.baseline.verdict.measurements if state.baseline else None)
        for goal in GOALS if before else ():
            if goal != state.goal and (told := _gain_at(goal, brief, before)):
                return [f"{_title(brief)} was accurate and gained nothing at {state.goal}, but {told}: --goal {goal}."]
        other = "a back end or a target that has kernels for its format" if brief.recipe.quantize else "fewer bits"
        return [f"{_title(brief)} was accurate and gained nothing at {state.goal}: what gains there is {other}."]
    return []


def _gain_at(goal: str, brief: Brief, before: Measurements) -> str:
    try:
        value = gain(goal, before, brief.verdict.measurements)
    except TrimtabError:  # not measured
        return ""
    if value < brief.recipe.accept.min_gain:
        return ""
    return gain_text(Verdict(outcome="accepted", reason="", gain=value), goal)


def _more_attempts(state: State) -> str:
    made = len(state.history)
    if made < state.max_attempts or made >= MOST_ATTEMPTS:
        return ""
    more = min(MOST_ATTEMPTS, made + 3)
    return f"All {made} attempts were used: --max-attempts {more} goes on behind them, and repeats none of their work."


def _gentler(state: State) -> str:
    """Names what none of the attempts did, where they took too much away."""
    harsh = [brief for brief in state.history if brief.verdict.failure_class in ("accuracy", "perplexity")]
    if len(harsh) < len(state.history):
        return ""
    formats = (FORMATS[brief.recipe.weight_format] for brief in state.history)
    if not any(row.storage and row.storage.bits == 8 for row in formats) and not any(
        (brief.recipe.quantize and brief.recipe.quantize.effective_bits or 0) >= 7 for brief in state.history
    ):
        return "No attempt kept eight bits: a recipe with quantize: {format: mixed, effective_bits: 7} takes less away."
    if not any(brief.recipe.distill for brief in state.history):
        return f"No attempt was trained, which brings much back: {_UNTRIED}."
    return ""


def _nearest(state: State) -> str:
    """Says which limits the attempt would have met that missed them least."""
    known = [b for b in state.history if b.verdict.recovery and b.verdict.perplexity_ratio]
    if not known:
        return ""
    brief = min(known, key=_miss)
    low, high = brief.verdict.recovery.low, brief.verdict.perplexity_ratio.high
    if not (low > 0.5 and high < 2):
        return ""
    recovery, ratio = math.floor(low * 100) / 100, math.ceil(high * 100) / 100
    accept = brief.recipe.accept
    recovery, ratio = min(recovery, accept.min_recovery), max(ratio, accept.max_perplexity_ratio)
    if (recovery, ratio) == (accept.min_recovery, accept.max_perplexity_ratio):
        return ""
    return (
        f"{_title(brief)} came nearest. It would meet accept: {{min_recovery: {recovery:g}, "
        f"max_perplexity_ratio: {ratio:g}}}; whether that is enough is for you to say, before you see it confirmed."
    )


def _miss(brief: Brief) -> float:
    accept, verdict = brief.recipe.accept, brief.verdict
    short = 1 - verdict.recovery.low / accept.min_recovery
    return max(short, verdict.perplexity_ratio.high / accept.max_perplexity_ratio - 1)


def _title(brief: Brief) -> str:
    return one_line(brief.recipe.title)
