"""What a verdict rules out; each stays in force for the whole run.

| failure class | rules out, beside the recipe itself |
|---|---|
| accuracy, perplexity, indeterminate | every recipe that takes as much away in every respect (`respects.risk`) |
| kv_cache_accuracy | every recipe whose KV cache is quantized as much or more |
| no_gain | every recipe that is in no respect more ambitious (`respects.ambition`) |
| does_not_fit | every recipe that needs as much memory in every respect (`respects.footprint`) |
| unsupported, export_damaged, degenerate_output | the same format (with a quantized KV cache: that pair) |
| training_diverged | the same pruning, trained at the same or a higher learning rate |
"""

from __future__ import annotations

from trimtab.adjust.respects import ambition, at_least, footprint, kind_of, kv_of, quantization, risk
from trimtab.loop.state import Brief
from trimtab.recipe import Recipe

TOO_HARSH = ("accuracy", "perplexity", "indeterminate")


def cause_of(brief: Brief) -> str:
    if brief.verdict.outcome == "indeterminate":
        return "indeterminate"
    return brief.verdict.failure_class or "accuracy"


def rules_out(brief: Brief, recipe: Recipe) -> bool:
    """Whether a finished attempt says that another recipe would fail for the same reason."""
    failed, cause = brief.recipe, cause_of(brief)
    if cause in TOO_HARSH:
        return at_least(risk(recipe), risk(failed))
    if cause == "kv_cache_accuracy":
        return kv_of(recipe) >= max(1, kv_of(failed))
    if cause == "no_gain":
        return at_least(ambition(failed), ambition(recipe))
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
