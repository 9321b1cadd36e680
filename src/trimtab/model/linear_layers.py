"""Which layers of a model a format applies to, and how tensor parallelism shares them among ranks."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

from trimtab import families
from trimtab.catalog.backends import BACKENDS
from trimtab.model.facts import Linear, ModelFacts
from trimtab.recipe import Quantization


def quantized_layers(facts: ModelFacts, quantize: Quantization) -> tuple[Linear, ...]:
    """Returns the linear layers that the format applies to: all that no pattern of `exclude` matches, without those
    that the family keeps in 16 bits.

    The output head is never among them: it is often the embedding too.
    """
    return _not_excluded(facts, quantize.exclude)


@lru_cache(maxsize=256)  # a plan asks this of the same few recipes for every engine that it considers
def _not_excluded(facts: ModelFacts, patterns: tuple[str, ...]) -> tuple[Linear, ...]:
    family = families.named(facts.model_type)
    left = (layer for layer in facts.linears if not any(fnmatchcase(layer.name, pattern) for pattern in patterns))
    return tuple(layer for layer in left if not family.keeps(layer.name))


def splits(facts: ModelFacts, ranks: int) -> bool:
    """Whether tensor parallelism over so many ranks gives each whole heads and the same share of the MLP."""
    # More ranks than KV heads is served by copying heads, so either may divide the other.
    whole_kv = facts.kv_heads % ranks == 0 or ranks % facts.kv_heads == 0
    neurons = facts.expert_size or facts.intermediate_size
    return facts.heads % ranks == 0 and whole_kv and neurons % ranks == 0


def features_per_rank(facts: ModelFacts, layer: Linear, ranks: int) -> int:
    """Returns the input features of a layer that a rank holds: of one behind heads or neurons, its share."""
    split = layer.name.endswith(families.named(facts.model_type).row_parallel)
    return layer.in_features // ranks if split else layer.in_features


def largest_group_size(facts: ModelFacts, quantize: Quantization, backend: str, ranks: int = 1) -> int | None:
    """Returns the largest group size of the back end that divides every quantized layer, or None."""
    features = {features_per_rank(facts, layer, ranks) for layer in quantized_layers(facts, quantize)}
    return next((size for size in BACKENDS[backend].group_sizes if not any(f % size for f in features)), None)
