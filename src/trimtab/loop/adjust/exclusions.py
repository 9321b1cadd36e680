"""What a verdict rules out; each stays in force for the whole run.

| failure class | rules out, beside the recipe itself |
|---|---|
| accuracy, perplexity, indeterminate | every recipe that takes as much away in every respect (`respects.risk`) |
| kv_cache_accuracy | every recipe whose KV cache is quantized as much or more |
| no_gain | every recipe that is in no respect more ambitious (`respects.ambition`) |
| does_not_fit, when served | every recipe that needs as much memory in every respect (`respects.footprint`) |
| does_not_fit, in training | every recipe whose training needs as much (`respects.training_footprint`) |
| does_not_fit, in another stage | every recipe that asks the same of that stage |
| unsupported, export_damaged, degenerate_output | the same format (with a quantized KV cache: that pair) |
| training_diverged | the same pruning, trained at the same or a higher learning rate |
"""

from __future__ import annotations

from collections.abc import Callable

from trimtab.loop.adjust.comparison import (
    ambition,
    at_least,
    footprint,
    kind_of,
    kv_of,
    quantization,
    risk,
    training_footprint,
)
from trimtab.loop.state import Brief
from trimtab.recipe import Recipe

TOO_HARSH = ("accuracy", "perplexity", "indeterminate")


def _needs_statistics(recipe: Recipe) -> bool:
    return any(part is not None and part.needs_statistics for part in (recipe.prune, recipe.quantize))


#: What a recipe asks of a stage before it is served, None for nothing: where memory was too little for that, it is too
#: little for every recipe that asks the same.
_ASKED: dict[str, Callable[[Recipe], object]] = {
    "calibrate": lambda recipe: recipe.calibrate if _needs_statistics(recipe) else None,
    "recalibrate": lambda recipe: (recipe.calibrate, recipe.prune) if _needs_statistics(recipe) else None,
    "prune": lambda recipe: recipe.prune,
    "generate": lambda recipe: recipe.distill,
    "teach": lambda recipe: recipe.distill,
    "distill": lambda recipe: recipe.distill,
    "sensitivity": lambda recipe: (recipe.quantize and recipe.quantize.needs_sensitivity) or None,
    # Gram matrices take far more than all else that quantizing holds.
    "quantize": lambda recipe: recipe.quantize and ("grams" if recipe.quantize.needs_grams else recipe.quantize.format),
}
#: Stages of a training. What they lack, no smaller batch in serving gives them.
TRAINING = ("generate", "teach", "distill")


def cause_of(brief: Brief) -> str:
    if brief.verdict.outcome == "indeterminate":
        return "indeterminate"
    return brief.verdict.failure_class or "accuracy"


def stage_of(brief: Brief) -> str:
    """Returns the stage whose work failed; "" where the artifact was being served.

    Verdicts from before they had a stage begin with the name of the work, as those of work that was killed do.
    """
    stage = brief.verdict.stage or brief.verdict.reason.partition(" ")[0]
    return stage if stage in _ASKED else ""


def rules_out(brief: Brief, recipe: Recipe) -> bool:
    """Whether a finished attempt says that another recipe would fail for the same reason."""
    failed, cause = brief.recipe, cause_of(brief)
    if cause in TOO_HARSH:
        return at_least(risk(recipe), risk(failed))
    if cause == "kv_cache_accuracy":
        return kv_of(recipe) >= max(1, kv_of(failed))
    if cause == "no_gain":
        return at_least(ambition(failed), ambition(recipe))
    if cause == "does_not_fit" and (stage := stage_of(brief)):
        if stage == "distill" and recipe.distill and failed.distill:
            return at_least(training_footprint(recipe), training_footprint(failed))
        asked = _ASKED[stage](recipe)
        return asked is not None and (stage in TRAINING or asked == _ASKED[stage](failed))
    if cause == "does_not_fit":
        return at_least(footprint(recipe), footprint(failed))
    if cause == "training_diverged":
        if recipe.prune != failed.prune or not (recipe.distill and failed.distill):
            return False
        return recipe.distill.learning_rate >= failed.distill.learning_rate
    mine, theirs = quantization(recipe), quantization(failed)
    if theirs.format == "bf16" and theirs.kv_cache == "none":
        return bool(failed.prune) and kind_of(recipe) == kind_of(failed)
    return mine.format == theirs.format and theirs.kv_cache in ("none", mine.kv_cache)
