"""The shapes that structured pruning leaves: known before any work, so that planning and checks have them."""

from __future__ import annotations

import math
from functools import lru_cache

from trimtab import families
from trimtab.families.fusion import block_of, in_block
from trimtab.model.facts import Linear, ModelFacts
from trimtab.recipe import DepthPruning, Pruning, SparsePruning, WidthPruning

#: Neurons and hidden channels are kept in multiples of this: what kernels like, and a whole group of INT4 weights.
MULTIPLE = 64


def kept(size: int, share: float | None, multiple: int = MULTIPLE) -> int:
    """Returns how many of `size` are kept when a share is removed: the nearest multiple, the smaller of two as near."""
    return multiple * math.ceil(size * (1 - share) / multiple - 0.5) if share else size


def refusal(facts: ModelFacts, prune: Pruning | None) -> str | None:
    """Returns why the model cannot be pruned so, in one sentence, or None when it can."""
    if isinstance(prune, DepthPruning) and prune.blocks >= facts.layers:
        blocks, most = f"{prune.blocks} of {facts.layers} blocks", facts.layers - 1
        return f"prune.blocks: {blocks} cannot be removed; " + (f"write at most {most}" if most else "remove it")
    if isinstance(prune, DepthPruning) and (why := families.named(facts.model_type).fixed_depth):
        what = f"depth cannot say in config.json what it leaves: a '{facts.model_type}' {why}"
        return f"prune.method: {what}; write sparsegpt"
    if isinstance(prune, SparsePruning):
        return _check_pattern(prune, facts)
    if not isinstance(prune, WidthPruning):
        return None
    if not families.named(facts.model_type).width:
        known = ", ".join(family.model_type for family in families.BY_TYPE.values() if family.width)
        return (
            f"prune.method: width pruning does not know {facts.architecture} (model_type '{facts.model_type}'), only "
            f"{known}; write method: depth"
        )
    if prune.kv_groups and prune.kv_groups >= facts.kv_heads:
        most = facts.kv_heads - 1
        remedy = f"write at most {most}" if most else "remove it"
        return f"prune.kv_groups: {prune.kv_groups} of {facts.kv_heads} KV groups cannot be removed; {remedy}"
    return _check_share("ffn", "neurons", prune.ffn, facts.intermediate_size, MULTIPLE) or _check_share(
        "hidden", "channels", prune.hidden, facts.hidden_size, _hidden_multiple(facts, prune)
    )


def _check_pattern(prune: SparsePruning, facts: ModelFacts) -> str | None:
    m = prune.n_m[1] if prune.n_m else 1
    for layer in facts.linears:
        if layer.in_features % m:
            return (
                f"prune.pattern: {prune.pattern} wants input features in groups of {m}, which do not divide the "
                f"{layer.in_features} of {layer.name}; write 'unstructured'"
            )
    return None


def _check_share(field: str, noun: str, share: float | None, size: int, multiple: int) -> str | None:
    if not share or 0 < kept(size, share, multiple) < size:
        return None
    rounded = f"{noun} are kept in multiples of {multiple}"
    possible = range(multiple, size, multiple)
    if not possible:
        return f"prune.{field}: {rounded}, and the model has {size}; remove it"
    if kept(size, share, multiple):
        least = math.ceil(1000 * (1 - possible[-1] / size)) / 1000
        return f"prune.{field}: {share} of {size} {noun} rounds to none, because {rounded}; write at least {least}"
    most = math.floor(1000 * (1 - possible[0] / size)) / 1000
    return f"prune.{field}: {share} of {size} {noun} leaves none, because {rounded}; write at most {most}"


def _hidden_multiple(facts: ModelFacts, prune: WidthPruning) -> int:
    """A Llama's config, say, is valid only where its heads divide the hidden size, whatever their dimension."""
    divides = families.named(facts.model_type).heads_divide_hidden
    return math.lcm(MULTIPLE, _heads(facts, prune)) if divides else MULTIPLE


def _heads(facts: ModelFacts, prune: WidthPruning) -> int:
    return facts.heads // facts.kv_heads * (facts.kv_heads - (prune.kv_groups or 0))


@lru_cache(maxsize=256)  # a plan asks this of the same few recipes for every engine that it considers
def pruned(facts: ModelFacts, prune: Pruning | None) -> ModelFacts:
    """Returns the facts of the pruned model. `refusal` has passed; unstructured pruning changes none.

    Which blocks depth pruning removes is measured later. Where they differ the lightest are taken to go, so that what
    is left is not more than planned for. `parameters` and `bytes` count norms and biases as before, a thousandth of a
    model.
    """
    if isinstance(prune, DepthPruning):
        return _resized(facts, _without_lightest(facts, prune.blocks), layers=facts.layers - prune.blocks)
    if not isinstance(prune, WidthPruning):
        return facts
    heads, kv_heads = _heads(facts, prune), facts.kv_heads - (prune.kv_groups or 0)
    sizes = {
        "attention": heads * facts.head_dim,
        "kv": kv_heads * facts.head_dim,
        "ffn": kept(facts.intermediate_size, prune.ffn),
        "hidden": kept(facts.hidden_size, prune.hidden, _hidden_multiple(facts, prune)),
    }
    family = families.named(facts.model_type)
    sides = {layer.name: family.layer(layer.name) for layer in facts.linears}
    linears = tuple(Linear(name, sizes[side.outputs], sizes[side.inputs]) for name, side in sides.items())
    narrowed = {"intermediate_size": sizes["ffn"], "hidden_size": sizes["hidden"]}
    return _resized(facts, linears, heads=heads, kv_heads=kv_heads, **narrowed)


def _without_lightest(facts: ModelFacts, count: int) -> tuple[Linear, ...]:
    """The linear layers of all blocks but the lightest ones, of equal ones the last, under the names that they get.

    As of the pruned model itself, one block with attention stays, where there is any.
    """
    weights = dict.fromkeys(range(facts.layers), 0)
    for layer in facts.linears:
        weights[block_of(layer.name)] += layer.parameters
    lightest = sorted(weights, key=lambda block: (weights[block], -block))
    removed = lightest[:count]
    attending = facts.blocks_with_attention
    if attending and attending <= {*removed}:
        heaviest = max(attending, key=lightest.index)
        removed = [block for block in lightest if block != heaviest][:count]
    kept = [block for block in range(facts.layers) if block not in removed]
    places = {block: place for place, block in enumerate(kept)}
    return tuple(
        layer._replace(name=in_block(layer.name, places[block_of(layer.name)]))
        for layer in facts.linears
        if block_of(layer.name) in places
    )


def _resized(facts: ModelFacts, linears: tuple[Linear, ...], **sizes: int) -> ModelFacts:
    embeddings = facts.vocab_size * (1 if facts.tied_embeddings else 2)
    gone = facts.linear_parameters - sum(layer.parameters for layer in linears)
    gone += embeddings * (facts.hidden_size - sizes.get("hidden_size", facts.hidden_size))
    left = facts.parameters - gone
    stored = round(facts.bytes * left / facts.parameters)
    same = facts.model_dump(exclude={"linears"})  # a copy would keep the cached count of the old linear layers
    return ModelFacts(**{**same, **sizes, "linears": linears, "parameters": left, "bytes": stored})
