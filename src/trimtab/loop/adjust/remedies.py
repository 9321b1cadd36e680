"""Recipes made from a failed one that are nearer than the next rung.

The KV cache in 16 bits; a smaller batch; a training in smaller parts, then with activation checkpointing; a tenth of
the learning rate; four times the tokens of a training with rounded weights; after pruning, four times the distillation
tokens, then half the pruning, or twice the weights; zeros anywhere instead of a pattern n:m, then half of them; the
groups of layers that a format harms most in 16 bits, where it lost hardly more than it may and no rung of mixed
precision stands ready to do that better.

Every remedy takes something away that can be taken away only so often, and no recipe is tried twice, so the loop ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trimtab.base.schema import Document
from trimtab.loop.adjust.comparison import at_least, bits_of, kv_of, quantization_aware, removed_by
from trimtab.loop.adjust.exclusions import TOO_HARSH, cause_of, stage_of
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import DepthPruning, MovementPruning, Recipe, SparsePruning, WidthPruning

#: The least share of neurons or channels that is worth a try: it makes a model hardly smaller.
LEAST_SHARE = 0.05
#: Groups of layers that stay in 16 bits as a remedy, then as the next: of the 120 to 320 that models of 30 to 80 blocks
#: have, a few make most of the harm.
EXCLUDED = (4, 16)
#: A loss is near its limit up to this multiple of what may be lost.
NEAR = 1.6
#: A penalty on movement pruning's scores that drops next to nothing.
LEAST_PENALTY = 0.1


def _change(recipe: Recipe, part: str, **fields: object) -> Recipe:
    """Returns the recipe with fields of one part changed, without the name that described it."""
    changed: Document = getattr(recipe, part).model_copy(update=fields)
    return recipe.model_copy(update={part: changed, "name": ""})


def remedies(last: Brief, history: Sequence[Brief], ladder: Sequence[Rung]) -> Iterator[tuple[Recipe, str]]:
    """Yields recipes made from the failed one that are nearer than the next rung, nearest first."""
    recipe, cause = last.recipe, cause_of(last)
    engine, kv = recipe.engine, kv_of(recipe) > 0
    earlier = [brief.recipe for brief in history if brief is not last and cause_of(brief) == cause]
    if cause in ("kv_cache_accuracy", "degenerate_output", "unsupported") and kv:
        plain = _change(recipe, "quantize", kv_cache="none")
        if bits_of(recipe) < 16 or recipe.prune:
            yield plain, "the same with the KV cache in 16 bits"
    elif cause == "does_not_fit" and stage_of(last):
        if stage_of(last) == "distill" and recipe.distill:
            yield from _lighter_training(recipe)
    elif cause == "does_not_fit" and not any(_work(other) == _work(recipe) for other in earlier):
        if engine.max_batch_size > 1:
            batch = max(1, engine.max_batch_size // 4)
            yield _change(recipe, "engine", max_batch_size=batch), f"the same with a batch of {batch}"
        elif engine.max_seq_len > 512:
            length = engine.max_seq_len // 2
            yield _change(recipe, "engine", max_seq_len=length), f"the same with a context of {length} tokens"
    elif cause == "training_diverged" and recipe.distill:
        if not any(other.prune == recipe.prune for other in earlier):
            rate = recipe.distill.learning_rate / 10
            yield _change(recipe, "distill", learning_rate=rate), f"the same with a learning rate of {rate:g}"
    elif cause in TOO_HARSH and recipe.prune:
        yield from _gentler_pruning(recipe, history, ladder)
    elif cause in TOO_HARSH and quantization_aware(recipe):
        if not any(quantization_aware(brief.recipe) for brief in history[:-1]):
            yield _longer(recipe)
    elif cause in TOO_HARSH and _is_near(last) and not _mixes_ahead(history, ladder):
        yield from _fewer_layers(recipe)


def _is_near(brief: Brief) -> bool:
    """Whether an attempt lost hardly more than it may: then a few layers decide, else the format does."""
    verdict, accept = brief.verdict, brief.recipe.accept
    if verdict.recovery is None or verdict.perplexity_ratio is None or verdict.perplexity_ratio.estimate <= 0:
        return False
    lost = (1 - verdict.recovery.estimate) / max(1 - accept.min_recovery, 1e-9)
    worse = math.log(verdict.perplexity_ratio.estimate) / math.log(accept.max_perplexity_ratio)
    return max(lost, worse) <= NEAR


def _mixes_ahead(history: Sequence[Brief], ladder: Sequence[Rung]) -> bool:
    """Whether a rung gives each layer the bits that it needs: it does what the remedy would, layer by layer."""
    tried = {brief.recipe.digest for brief in history}
    rungs = (rung.recipe for rung in ladder if rung.recipe.digest not in tried)
    return any(recipe.quantize is not None and recipe.quantize.row.mixes for recipe in rungs)


def _fewer_layers(recipe: Recipe) -> Iterator[tuple[Recipe, str]]:
    quantize = recipe.quantize
    if quantize is None or quantize.row.is_cast or quantize.row.mixes:
        return
    if groups := next((number for number in EXCLUDED if number > quantize.exclude_sensitive), None):
        fewer = _change(recipe, "quantize", exclude_sensitive=groups)
        yield fewer, f"the same with the {groups} groups of layers that {quantize.format} harms most in 16 bits"


def _lighter_training(recipe: Recipe) -> Iterator[tuple[Recipe, str]]:
    """A quarter of the windows at a time, which costs nothing; then one, with activation checkpointing, which does."""
    distill = recipe.distill
    most = distill.batch_size // distill.processes
    parts = [n for n in range(4 * distill.gradient_accumulation, most) if most % n == 0]
    if parts and not distill.activation_checkpointing:
        lighter = _change(recipe, "distill", gradient_accumulation=parts[0])
        yield lighter, f"the same, trained on {lighter.distill.windows_at_once} windows at a time"
    least = _change(recipe, "distill", gradient_accumulation=most, activation_checkpointing=True)
    yield least, "the same, trained on one window at a time with activation checkpointing"


def _gentler_pruning(
    recipe: Recipe, history: Sequence[Brief], ladder: Sequence[Rung]
) -> Iterator[tuple[Recipe, str]]:
    if isinstance(recipe.prune, SparsePruning):
        if recipe.prune.n_m:
            # Free to stand anywhere, as many zeros harm far less, and no engine of today is faster with either.
            yield _change(recipe, "prune", pattern="unstructured"), "the same with its zeros anywhere in a row"
        elif recipe.prune.sparsity >= 0.2:
            sparsity = round(recipe.prune.sparsity / 2, 3)
            yield _change(recipe, "prune", sparsity=sparsity), f"the same with a sparsity of {sparsity:g}"
        return
    tried = {brief.recipe.digest for brief in history}
    if any(_removes_less(rung.recipe, recipe) and rung.recipe.digest not in tried for rung in ladder):
        return  # the ladder itself goes on with less
    # Teaching costs the most time, so it is prolonged once in a run.
    taught = [brief.recipe for brief in history if brief.recipe.prune and brief.recipe.distill]
    pairs = ((a, b) for a in taught for b in taught if a.prune == b.prune)
    prolonged = any(a.distill.tokens > b.distill.tokens for a, b in pairs)
    if recipe.distill and not prolonged:
        yield _longer(recipe)
    if isinstance(recipe.prune, MovementPruning):
        yield from _gentler_movement(recipe)
    elif halved := _halved(recipe.prune):
        gentler = recipe.model_copy(update={"prune": halved, "name": ""})
        yield gentler, f"the same with half of the pruning, {halved.title}"


def _longer(recipe: Recipe) -> tuple[Recipe, str]:
    tokens = 4 * recipe.distill.tokens
    return _change(recipe, "distill", tokens=tokens), f"the same with {tokens:,} distillation tokens"


def _removes_less(recipe: Recipe, other: Recipe) -> bool:
    """Whether a recipe removes something, in no respect more than another and in some respect less."""
    less, more = removed_by(recipe), removed_by(other)
    return any(less) and less != more and at_least(more, less)


def _halved(prune: DepthPruning | WidthPruning) -> DepthPruning | WidthPruning | None:
    """Returns the pruning that removes half of everything, or None when that is nothing."""
    if isinstance(prune, DepthPruning):
        return prune.model_copy(update={"blocks": prune.blocks // 2}) if prune.blocks > 1 else None
    groups = (prune.kv_groups or 0) // 2 or None
    ffn, hidden = (share / 2 if share and share >= 2 * LEAST_SHARE else None for share in (prune.ffn, prune.hidden))
    if not (ffn or groups or hidden):
        return None
    return WidthPruning(method="width", ffn=ffn, kv_groups=groups, hidden=hidden)


def _gentler_movement(recipe: Recipe) -> Iterator[tuple[Recipe, str]]:
    """Twice the weights, until there would be none to drop; or a quarter of the penalty."""
    if recipe.prune.penalty:
        penalty = recipe.prune.penalty / 4
        if penalty >= LEAST_PENALTY:
            yield _change(recipe, "prune", penalty=penalty), f"the same with a penalty of {penalty:g}"
        return
    sparsity = round(1 - 2 * (1 - recipe.prune.sparsity), 3)
    if sparsity >= 0.1:
        yield _change(recipe, "prune", sparsity=sparsity), f"the same with a sparsity of {sparsity:g}"


def _work(recipe: Recipe) -> str:
    """Identifies what is done to the weights, without how they are served."""
    return recipe.model_copy(update={"engine": Recipe().engine}).digest
