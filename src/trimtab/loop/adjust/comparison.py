"""What a recipe takes away, what it saves and what it needs, each respect apart: so recipes are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.recipe import DepthPruning, MovementPruning, Quantization, Recipe, SparsePruning, WidthPruning

#: How blindly a method chooses the weights that become zero. At 50 % the log-perplexity of SmolLM2-135M rises by 0.39
#: with SparseGPT, 0.55 with Wanda and 2.64 by magnitude (benchmarks/pruning.py).
_BLINDNESS = {"sparsegpt": 0.0, "wanda": 1.0, "magnitude": 2.0}


def quantization(recipe: Recipe) -> Quantization:
    return recipe.quantize or Quantization(format="bf16")


def excluded_by(quantize: Quantization) -> int:
    return len(quantize.exclude) + quantize.exclude_sensitive


def kv_of(recipe: Recipe) -> int:
    return KV_CACHES[quantization(recipe).kv_cache].harshness


def kind_of(recipe: Recipe) -> tuple[object, object]:
    """How a recipe prunes, whatever the amount."""
    return getattr(recipe.prune, "method", None), getattr(recipe.prune, "n_m", None)


def removed_by(recipe: Recipe) -> tuple[float, ...]:
    """What structured pruning removes: blocks, and of every block neurons, KV groups and hidden channels."""
    prune = recipe.prune
    blocks = prune.blocks if isinstance(prune, DepthPruning) else 0
    width = (prune.ffn, prune.kv_groups, prune.hidden) if isinstance(prune, WidthPruning) else (None, None, None)
    return blocks, *(part or 0 for part in width)


def bits_of(recipe: Recipe) -> float:
    quantize = quantization(recipe)
    return quantize.effective_bits or quantize.row.bits


def risk(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe takes away, each respect apart; more is riskier."""
    quantize = quantization(recipe)
    harsh = 12 - quantize.effective_bits if quantize.effective_bits else quantize.row.harshness
    group = quantize.group_size if bits_of(recipe) < 8 else 0
    # Teaching repairs what pruning broke; where nothing was pruned, nothing is as good.
    untaught = (-recipe.distill.tokens if recipe.distill else 0) if recipe.prune else -math.inf
    taken = (harsh, kv_of(recipe), *removed_by(recipe), *_sparsity(recipe), group, untaught)
    return (*taken, -quantization_aware(recipe), -excluded_by(quantize))


def quantization_aware(recipe: Recipe) -> int:
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


def ambition(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe saves, each respect apart; more is better at the goal. Sparsity saves nothing."""
    quantize = quantization(recipe)
    return -bits_of(recipe), quantize.row.rounds_inputs, kv_of(recipe), *removed_by(recipe), -excluded_by(quantize)


def footprint(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe needs of each device's memory, each respect apart."""
    quantize, engine = quantization(recipe), recipe.engine
    devices = engine.tensor_parallel_size * engine.pipeline_parallel_size
    kept, removed = excluded_by(quantize), (-part for part in removed_by(recipe))
    return (bits_of(recipe), -kv_of(recipe), *removed, kept, engine.max_batch_size, engine.max_seq_len,
            engine.max_num_tokens, -devices, bool(recipe.distill))  # fmt: skip


def training_footprint(recipe: Recipe) -> tuple[float, ...]:
    """What the recipe's training needs of each device's memory, each respect apart."""
    distill, removed = recipe.distill, (-part for part in removed_by(recipe))
    zeros = isinstance(recipe.prune, SparsePruning) + 2 * isinstance(recipe.prune, MovementPruning)
    return (*removed, zeros, distill.quantization_aware, distill.windows_at_once * distill.length,
            not distill.activation_checkpointing, distill.hidden_weight > 0, not distill.stored_logits,
            -distill.processes)  # fmt: skip


def at_least(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(left, right, strict=True))
