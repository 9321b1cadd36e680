"""The next recipe: what the ladder and the history of verdicts leave to try, in the ladder's order.

Each verdict rules recipes out, and stays in force for the whole run:

| failure class | rules out, beside the recipe itself |
|---|---|
| accuracy, perplexity, indeterminate | every recipe that takes as much away in every respect (`_risk`) |
| kv_cache_accuracy | every recipe whose KV cache is quantized as much or more |
| no_gain | every recipe that is in no respect more ambitious (`_ambition`) |
| does_not_fit | every recipe that needs as much memory in every respect (`_footprint`) |
| unsupported, export_damaged, degenerate_output | the same format (with a quantized KV cache: that pair) |
| training_diverged | the same pruning, trained at the same or a higher learning rate |

Some failures have a nearer remedy than the next rung, a recipe made from the failed one (`_remedies`): the KV
cache in 16 bits; a smaller batch; a tenth of the learning rate; four times the tokens of a training with rounded
weights; after pruning, four times the distillation tokens, then half the pruning, or twice the weights; zeros anywhere
instead of a pattern n:m, then half of them.
Every remedy takes something away that can be taken away only so often, and no recipe is tried twice, so the loop
ends.

Mixed precision has a model of its own, to skip rungs that would cost minutes to fail. As bits grow, the
logarithm of the perplexity ratio falls about geometrically, so log(log ratio) is fitted as a line in the bits
of the measured recipes; one measurement is extrapolated with `HALVING_BITS`. SmolLM2-135M, on 20 windows of
trimtab's own text, had 1.109 in INT4 GPTQ and 1.054 mixed at 5 bits: log ratio 0.104 to 0.053, halved in one bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from trimtab.plan import Rung
from trimtab.recipe import (
    STATIC_ACTIVATIONS,
    DepthPruning,
    MovementPruning,
    Quantization,
    Recipe,
    SparsePruning,
    WidthPruning,
)
from trimtab.schema import Document
from trimtab.state import Brief

#: With one measurement: the bits that halve the log ratio.
HALVING_BITS = 1.0
#: A rung is skipped when its predicted log ratio exceeds this multiple of the limit's. Acceptance wants the
#: whole interval below the limit, so a prediction at the limit itself already fails more often than not.
CLEARLY = 1.1
#: The least share of neurons or channels that is worth a try: it makes a model hardly smaller.
LEAST_SHARE = 0.05
#: A penalty on movement pruning's scores that drops next to nothing.
LEAST_PENALTY = 0.1
#: Formats that also multiply in few bits.
_ROUNDS_ACTIVATIONS = (*STATIC_ACTIVATIONS, "fp8_per_channel")
#: What ends the line of mixed precision at four bits, the nearest first.
_FOUR_BITS = ("int4_gptq", "int4_awq", "int4_rtn")
_TOO_HARSH = ("accuracy", "perplexity", "indeterminate")
_BITS = {
    "fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8_wo": 8.0, "int8_sq": 8.0, "fp8": 8.0, "fp8_per_channel": 8.0,
    "int4_rtn": 4.0, "int4_awq": 4.0, "int4_gptq": 4.0, "w4a8_awq": 4.0, "nvfp4": 4.5, "mxfp4": 4.25,
}  # fmt: skip
#: How much a format takes away, in the order of `trimtab.candidates.EXPECTATIONS`; `mixed` lies between.
_HARSHNESS = {
    "fp32": 0.0, "fp16": 0.0, "bf16": 0.0, "int8_wo": 1.0, "fp8_per_channel": 1.5, "fp8": 2.0, "int8_sq": 3.0,
    "int4_gptq": 8.0, "int4_awq": 9.0, "w4a8_awq": 9.5, "nvfp4": 9.5, "mxfp4": 10.0, "int4_rtn": 10.0,
}  # fmt: skip
#: How blindly a method chooses the weights that become zero. At 50 % the log-perplexity of SmolLM2-135M rises by 0.39
#: with SparseGPT, 0.55 with Wanda and 2.64 by magnitude (benchmarks/pruning.py).
_BLINDNESS = {"sparsegpt": 0.0, "wanda": 1.0, "magnitude": 2.0}
#: How much a KV cache takes away, which is in the same order how much it saves.
_KV_CACHE = {"none": 0, "fp8": 1, "int8": 1, "nvfp4": 2}


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
    failed = f"{last.recipe.title} failed ({_cause(last)})"
    if last.verdict.outcome == "accepted":
        return None, f"{last.recipe.title} was accepted"
    tried = {brief.recipe.digest for brief in history}
    rungs = {rung.recipe.digest: rung for rung in ladder}
    for recipe, why in _remedies(last, history, ladder):
        others = (brief for brief in history if brief is not last)
        if recipe.digest not in tried and runs(recipe) and not any(_rules_out(brief, recipe) for brief in others):
            rung = rungs.get(recipe.digest) or Rung(recipe=recipe, why=why)
            return rung, f"{failed}: next is {why}"
    open_rungs = [rung for rung in ladder if rung.recipe.digest not in tried]
    allowed = [rung for rung in open_rungs if not any(_rules_out(brief, rung.recipe) for brief in history)]
    chosen, skipped = _skip(allowed, ladder, history)
    if chosen is None:
        left = f"; the verdicts rule out the other {len(open_rungs)} of the ladder" if open_rungs else ""
        return None, f"{failed}: nothing is left to try, {len(tried)} tried{left}"
    return chosen, f"{failed}: next is {chosen.recipe.title}, {_DIRECTION[_cause(last)]}{skipped}"


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


def _cause(brief: Brief) -> str:
    if brief.verdict.outcome == "indeterminate":
        return "indeterminate"
    return brief.verdict.failure_class or "accuracy"


# --- what a verdict rules out -----------------------------------------------------------------------------


def _quantize(recipe: Recipe) -> Quantization:
    return recipe.quantize or Quantization(format="bf16")


def _excluded(quantize: Quantization) -> int:
    return len(quantize.exclude) + quantize.exclude_sensitive


def _kv(recipe: Recipe) -> int:
    return _KV_CACHE[_quantize(recipe).kv_cache]


def _kind(recipe: Recipe) -> tuple[object, object]:
    """How a recipe prunes, whatever the amount."""
    return getattr(recipe.prune, "method", None), getattr(recipe.prune, "n_m", None)


def _removed(recipe: Recipe) -> tuple[float, ...]:
    """What structured pruning removes: blocks, and of every block neurons, KV groups and hidden channels."""
    prune = recipe.prune
    blocks = prune.blocks if isinstance(prune, DepthPruning) else 0
    width = (prune.ffn, prune.kv_groups, prune.hidden) if isinstance(prune, WidthPruning) else (None, None, None)
    return blocks, *(part or 0 for part in width)


def _bits(recipe: Recipe) -> float:
    quantize = _quantize(recipe)
    return quantize.effective_bits or _BITS[quantize.format]


def _risk(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe takes away, each respect apart; more is riskier."""
    quantize = _quantize(recipe)
    harsh = 12 - quantize.effective_bits if quantize.effective_bits else _HARSHNESS[quantize.format]
    group = quantize.group_size if _bits(recipe) < 8 else 0
    # Teaching repairs what pruning broke; where nothing was pruned, nothing is as good.
    untaught = (-recipe.distill.tokens if recipe.distill else 0) if recipe.prune else -math.inf
    taken = (harsh, _kv(recipe), *_removed(recipe), *_sparsity(recipe), group, untaught, -_rehearsed(recipe))
    return (*taken, -_excluded(quantize))


def _rehearsed(recipe: Recipe) -> int:
    """Tokens that the weights were trained with as they are rounded."""
    return recipe.distill.tokens if recipe.distill and recipe.distill.quantization_aware else 0


def _sparsity(recipe: Recipe) -> tuple[float, ...]:
    """How many weights become zero, how little freedom there is in which, how blindly they are chosen, in each layer
    and among the layers, and how dear the scores are that choose them."""
    prune = recipe.prune
    if isinstance(prune, MovementPruning):
        return prune.sparsity or 0.0, 0.0, 0.0, 0.0, prune.penalty or 0.0
    if not isinstance(prune, SparsePruning):
        return 0.0, 0.0, 0.0, 0.0, 0.0
    rigid = 1 / prune.n_m[1] if prune.n_m else 0.0
    return prune.sparsity, rigid, _BLINDNESS[prune.method], float(prune.allocation == "uniform"), 0.0


def _ambition(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe saves, each respect apart; more is better at the goal. Sparsity saves nothing."""
    quantize = _quantize(recipe)
    arithmetic = quantize.format in _ROUNDS_ACTIVATIONS
    return -_bits(recipe), arithmetic, _kv(recipe), *_removed(recipe), -_excluded(quantize)


def _footprint(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe needs of each device's memory, each respect apart."""
    quantize, engine = _quantize(recipe), recipe.engine
    devices = engine.tensor_parallel_size * engine.pipeline_parallel_size
    kept, removed = _excluded(quantize), (-part for part in _removed(recipe))
    return (_bits(recipe), -_kv(recipe), *removed, kept, engine.max_batch_size, engine.max_seq_len,
            engine.max_num_tokens, -devices, bool(recipe.distill))  # fmt: skip


def _at_least(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(left, right, strict=True))


def _rules_out(brief: Brief, recipe: Recipe) -> bool:
    """Whether a finished attempt says that another recipe would fail for the same reason."""
    failed, cause = brief.recipe, _cause(brief)
    if cause in _TOO_HARSH:
        return _at_least(_risk(recipe), _risk(failed))
    if cause == "kv_cache_accuracy":
        return _kv(recipe) >= max(1, _kv(failed))
    if cause == "no_gain":
        return _at_least(_ambition(failed), _ambition(recipe))
    if cause == "does_not_fit":
        return _at_least(_footprint(recipe), _footprint(failed))
    if cause == "training_diverged":
        if recipe.prune != failed.prune or not (recipe.distill and failed.distill):
            return False
        return recipe.distill.learning_rate >= failed.distill.learning_rate
    mine, theirs = _quantize(recipe), _quantize(failed)
    if theirs.format == "bf16" and theirs.kv_cache == "none":
        return bool(failed.prune) and _kind(recipe) == _kind(failed)
    return mine.format == theirs.format and theirs.kv_cache in ("none", mine.kv_cache)


# --- what remedies a failure ------------------------------------------------------------------------------


def _change(recipe: Recipe, part: str, **fields: object) -> Recipe:
    """Returns the recipe with fields of one part changed, without the name that described it."""
    changed: Document = getattr(recipe, part).model_copy(update=fields)
    return recipe.model_copy(update={part: changed, "name": ""})


def _remedies(last: Brief, history: Sequence[Brief], ladder: Sequence[Rung]) -> Iterator[tuple[Recipe, str]]:
    """Yields recipes made from the failed one that are nearer than the next rung, nearest first."""
    recipe, cause = last.recipe, _cause(last)
    engine, kv = recipe.engine, _kv(recipe) > 0
    earlier = [brief.recipe for brief in history if brief is not last and _cause(brief) == cause]
    if cause in ("kv_cache_accuracy", "degenerate_output", "unsupported") and kv:
        plain = _change(recipe, "quantize", kv_cache="none")
        if _bits(recipe) < 16 or recipe.prune:
            yield plain, "the same with the KV cache in 16 bits"
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
    elif cause in _TOO_HARSH and recipe.prune:
        yield from _gentler_pruning(recipe, history, ladder)
    elif cause in _TOO_HARSH and _rehearsed(recipe) and not any(_rehearsed(brief.recipe) for brief in history[:-1]):
        yield _longer(recipe)


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
    less, more = _removed(recipe), _removed(other)
    return any(less) and less != more and _at_least(more, less)


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


# --- what mixed precision may skip ------------------------------------------------------------------------


def predicted_ratio(recipe: Recipe, history: Sequence[Brief]) -> float | None:
    """Returns the perplexity ratio to expect of a `mixed` recipe, from attempts that differ in bits alone.

    Mixed precision mixes INT4 GPTQ with INT8, so GPTQ is its end at 4 bits; AWQ, then round-to-nearest, stands in
    where that was not measured. None when nothing was measured.
    """
    points: dict[str, tuple[float, float]] = {}
    for brief in history:
        form, ratio = _quantize(brief.recipe).format, brief.verdict.perplexity_ratio
        same = (brief.recipe.prune, brief.recipe.distill) == (recipe.prune, recipe.distill)
        if same and form in (*_FOUR_BITS, "mixed") and ratio and ratio.estimate > 1:
            key = form if form != "mixed" else brief.recipe.digest
            points[key] = (_bits(brief.recipe), math.log(math.log(ratio.estimate)))
    measured = [form for form in _FOUR_BITS if form in points]
    for worse in measured[1:]:
        points.pop(worse)
    if not points or recipe.quantize is None or recipe.quantize.effective_bits is None:
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


def _skip(
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
