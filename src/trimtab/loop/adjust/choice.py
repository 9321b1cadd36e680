"""The next recipe: what the ladder and the history of verdicts leave to try, in the ladder's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trimtab.loop.adjust.exclusions import cause_of, rules_out, stage_of
from trimtab.loop.adjust.prediction import skip
from trimtab.loop.adjust.remedies import remedies
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import Recipe

_DIRECTION = {
    "accuracy": "which takes less away",
    "perplexity": "which takes less away",
    "indeterminate": "which takes less away",
    "kv_cache_accuracy": "which takes less from the KV cache",
    "no_gain": "which gains in another way",
    "export_damaged": "in another format",
    "degenerate_output": "in another format",
    "does_not_fit": "which needs less memory",
    "unsupported": "in another format",
    "training_diverged": "which trains otherwise or not at all",
}


def next_recipe(
    ladder: Sequence[Rung], history: Sequence[Brief], runs: Callable[[Recipe], bool] = lambda recipe: True
) -> tuple[Rung | None, str]:
    """Returns the rung to try next and one sentence that says why; or None, and why the run stops.

    Args:
        ladder: the recipes of the plan, in order.
        history: the finished attempts, oldest first; a baseline among them is ignored.
        runs: whether the target can run a recipe on this model, asked of remedies: what is on the ladder can.
    """
    history = [brief for brief in history if brief.verdict.outcome != "baseline"]
    if not history:
        return (ladder[0], "the first rung of the ladder") if ladder else (None, "the ladder is empty")
    last = history[-1]
    where = f" in {stage_of(last)}" if cause_of(last) == "does_not_fit" and stage_of(last) else ""
    failed = f"{last.recipe.title} failed ({cause_of(last)}{where})"
    if last.verdict.outcome == "accepted":
        return None, f"{last.recipe.title} was accepted"
    tried = {brief.recipe.digest for brief in history}
    rungs = {rung.recipe.digest: rung for rung in ladder}
    for recipe, why in remedies(last, history, ladder):
        others = (brief for brief in history if brief is not last)
        if recipe.digest not in tried and runs(recipe) and not any(rules_out(brief, recipe) for brief in others):
            rung = rungs.get(recipe.digest) or Rung(recipe=recipe, why=why)
            return rung, f"{failed}: next is {why}"
    open_rungs = [rung for rung in ladder if rung.recipe.digest not in tried]
    allowed = [rung for rung in open_rungs if not any(rules_out(brief, rung.recipe) for brief in history)]
    chosen, skipped = skip(allowed, ladder, history)
    if chosen is None:
        left = f"; the verdicts rule out the other {len(open_rungs)} of the ladder" if open_rungs else ""
        return None, f"{failed}: nothing is left to try, {len(tried)} tried{left}"
    return chosen, f"{failed}: next is {chosen.recipe.title}, {_DIRECTION[cause_of(last)]}{skipped}"
