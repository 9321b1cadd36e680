"""The run in sentences."""

from __future__ import annotations

from collections import Counter

from trimtab.catalog.goals import GOALS
from trimtab.judge import Verdict
from trimtab.loop.ledger import exhausted
from trimtab.loop.state import Brief, State
from trimtab.report.rows import interval_text, one_line


def accepted(state: State) -> tuple[int, Brief] | None:
    """Returns the accepted attempt and its number, or None."""
    numbered = enumerate(state.history, start=1)
    return next((pair for pair in numbered if pair[1].verdict.outcome == "accepted"), None)


def headline(state: State) -> str:
    """Returns the outcome of the run in one sentence."""
    found = accepted(state)
    if found:
        number, brief = found
        gain = gain_text(brief.verdict, state.goal)
        return f"{one_line(brief.recipe.title)} is accepted on attempt {number}{f': {gain}' if gain else ''}."
    if state.baseline and state.baseline.verdict.outcome == "indeterminate":
        return "Nothing is accepted: nothing was tried, because the items cannot decide."
    if state.baseline and state.baseline.verdict.outcome != "baseline":
        return "Nothing is accepted: the baseline itself could not be measured."
    if not state.history:
        return "Nothing is accepted: no recipe was tried."
    count = len(state.history)
    none = "the one recipe tried was not" if count == 1 else f"none of the {count} recipes tried was"
    return f"Nothing is accepted: {none} shown to be good enough."


def explanation(state: State) -> list[str]:
    """Returns, in a few sentences, why the accepted attempt was accepted or why none was, and what was cut."""
    told = (budget_text(state), power_text(state), truncation_text(state))
    return [*_outcome(state), *(sentence for sentence in told if sentence)]


def budget_text(state: State) -> str:
    """Returns how the budget ended the run, in a sentence; '' where it did not."""
    ended = not accepted(state) and len(state.history) < state.max_attempts and state.baseline
    over = exhausted(state) if ended and state.baseline.verdict.outcome == "baseline" else ""
    return sentence(over) if over else ""


def power_text(state: State) -> str:
    """Returns what the items of the run could show, in a sentence, where no attempt was accepted; '' for nothing."""
    power = state.baseline.verdict.power if state.baseline else None
    tried = state.history and not accepted(state)
    return sentence(f"Told beforehand: {power.sentence}") if tried and power and power.sentence else ""


def _outcome(state: State) -> list[str]:
    found = accepted(state)
    if found:
        return [sentence(found[1].verdict.reason), confirmation_text(found[1].verdict)]
    if state.baseline and state.baseline.verdict.outcome != "baseline":
        return [sentence(state.baseline.verdict.reason)]
    if not state.history:
        return ["The run ended before its first attempt." if state.baseline else "Nothing was measured yet."]
    causes = Counter(_cause(brief.verdict) for brief in state.history)
    tally = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    last = state.history[-1]
    return [
        f"{len(state.history)} of at most {state.max_attempts} attempts were made; they ended in: {tally}.",
        sentence(f"The last, {one_line(last.recipe.title)}: {last.verdict.reason}"),
        "The deploy gate releases nothing.",
    ]


def attempt_headline(state: State) -> str:
    """Returns the verdict on the current attempt in one sentence."""
    title, verdict = one_line(state.recipe.title), state.verdict
    if verdict is None:
        return f"{title} is not judged yet."
    if verdict.outcome == "baseline":
        return "The baseline: the model unchanged, which every attempt is compared with."
    cause = f" for {verdict.failure_class}" if verdict.failure_class else ""
    who = title if state.attempt else "The baseline"
    gain = gain_text(verdict, state.goal) if verdict.outcome == "accepted" else ""
    return f"{who} is {verdict.outcome}{cause}{f': {gain}' if gain else ''}."


def gain_text(verdict: Verdict, goal: str) -> str:
    """Returns '41 % fewer bytes', or '' when the gain is unknown."""
    return "" if verdict.gain is None else f"{verdict.gain:.1%} {GOALS[goal].measure.words}".replace("%", " %")


def confirmation_text(verdict: Verdict) -> str:
    """Returns what fresh items said, in one sentence."""
    fresh = verdict.confirmation
    if fresh is None:
        return "It was confirmed on fresh items." if verdict.confirmed else "It was not tried on fresh items."
    told = "confirmed" if verdict.confirmed else "not confirmed"
    return (
        f"It was {told} on {fresh.items:,} fresh items (recovery {interval_text(fresh.recovery)}) and "
        f"{fresh.windows:,} fresh windows (perplexity ratio {interval_text(fresh.perplexity_ratio)})."
    )


def truncated_text(verdict: Verdict) -> str:
    """Returns how many requests of one attempt were cut, in a sentence; '' for none."""
    if not verdict.truncated:
        return ""
    asked = "requests were" if verdict.truncated != 1 else "request was"
    return f"{verdict.truncated:,} {asked} longer than can be read and lost the beginning, as in lm-eval."


def truncation_text(state: State) -> str:
    """Returns at which attempts of a run requests were cut, and how many, in a sentence; '' for none."""
    briefs = [("of the baseline", state.baseline)] if state.baseline else []
    briefs += [(f"of attempt {number}", brief) for number, brief in enumerate(state.history, start=1)]
    cut = [f"{brief.verdict.truncated:,} {whose}" for whose, brief in briefs if brief.verdict.truncated]
    if not cut:
        return ""
    return f"Requests that were longer than can be read lost their beginning, as in lm-eval: {', '.join(cut)}."


def _cause(verdict: Verdict) -> str:
    undecided = "undecided " if verdict.outcome == "indeterminate" else ""
    return f"{undecided}{verdict.failure_class}" if verdict.failure_class else verdict.outcome


def sentence(text: str) -> str:
    """Returns the text on one line, with a capital and a full stop."""
    text = one_line(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
