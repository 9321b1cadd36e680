"""The facts of a model by its config.json alone, for planning before its weights are anywhere near.

Names and shapes of its tensors follow from what its family says of its layers, norms and biases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.families import Family, LatentAttention, SharedInput
from trimtab.families.parts import Said, Shape
from trimtab.model import low_precision
from trimtab.model.configured import Sizes, experts_of, sizes_of, ties_embeddings
from trimtab.model.facts import ModelFacts, facts_of
from trimtab.model.headers import Tensor


def outline(path: str | Path) -> ModelFacts:
    """Returns the facts of the model whose config.json this is, as if its weights were there in 16 bits.

    Raises:
        InputError: no config of a model whose shapes are known, or in low precision that is not read.
    """
    path = Path(path)
    try:
        config = families.as_fetched(json.loads(path.read_bytes()))
        config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no config.json of a model ({error.__class__.__name__}: {error})") from None
    family = families.of(config, str(path))
    low_precision.declared(str(path), config)
    try:
        found = shapes(config, family, path)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: lacks {error}; give the model's own config.json") from None
    tensors = {name: Tensor(name, "BF16", shape, 0, 2 * math.prod(shape)) for name, shape in found.items()}
    return facts_of(path.parent, config, tensors)


def shapes(config: Mapping[str, Any], family: Family, path: Path) -> dict[str, Shape]:
    """Returns the shape of each tensor of a model by its name, as its checkpoint holds it.

    Raises:
        InputError, KeyError: the config, which lies at `path`, lacks a size.
    """
    whole, config = config, families.text_config(config)
    config = {**config, **family.sizes(config)}
    sizes = sizes_of(path, config, family)
    if family.mlp and not config.get("intermediate_size"):  # weights would tell it
        raise KeyError("intermediate_size")
    vocabulary = (sizes.vocabulary, sizes.hidden)
    found: dict[str, Shape] = {f"{family.embedding}.weight": vocabulary}
    found |= _norm(family.last_norm, (sizes.hidden,), family)
    if not ties_embeddings(whole):
        found[f"{family.head}.weight"] = vocabulary
    if _says(config, family.head_bias):
        found[f"{family.head}.bias"] = vocabulary[:1]
    if family.experts and any("experts" in parts for parts in family.parts(config)):
        experts_of(path, config, family)
    others = family.others(config, sizes)
    for number, parts in enumerate(family.parts(config)):
        in_block = {name: shape for part in sorted(parts) for name, shape in _PARTS[part](config, family, sizes)}
        for norm in family.norms(config) if callable(family.norms) else family.norms:
            in_block |= _norm(norm, (sizes.hidden,), family)
        found |= {f"{family.blocks}.{number}.{name}": shape for name, shape in in_block.items()}
        found |= {name.format(number): shape for name, shape in others.items() if "{}" in name}
    found |= {name: shape for name, shape in others.items() if "{}" not in name}
    found |= family.wrapper.tower(families.as_fetched(whole)) if family.wrapper else {}
    return {name: shape for name, shape in found.items() if shape is not None}


def _attention(config: Mapping[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of a block's attention, by their names in the block."""
    attention = family.attention
    heads, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    features = {
        "hidden": sizes.hidden, "attention": heads, "kv": kv, "qkv": heads + 2 * kv, "attention_gate": 2 * heads
    }  # fmt: skip
    if isinstance(attention, LatentAttention):
        yield from _latent(config, family, sizes)
        return
    biases = zip(attention.inputs, (family.qkv_bias, family.output_bias), strict=True)
    for shared, bias in biases:
        yield from _linears(shared, features, _says(config, bias))
    if attention.head_norms and _says(config, attention.has_head_norms):
        for norm, count in zip(attention.norms_of_heads, (sizes.heads, sizes.kv_heads), strict=False):
            size = sizes.head_dim
            shape = {"head": (size,), "each head": (count, size), "heads": (count * size,)}[attention.head_norms_span]
            yield from _norm(norm, shape, family).items()


def _recurrent(config: Mapping[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of a block's recurrent mixer."""
    for name, shape in family.recurrent.shapes(config).items():
        yield f"{family.recurrent.module}.{name}", shape


def _latent(config: Mapping[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of attention over compressed keys and values; queries are compressed where a rank is given."""
    part, rank, turned = family.attention, config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value, query_rank = config["qk_nope_head_dim"], config["v_head_dim"], config.get("q_lora_rank")
    features = {
        "hidden": sizes.hidden, "attention": sizes.heads * (plain + turned), "values": sizes.heads * value,
        "query_latent": query_rank or 0, "kv_latent": rank, "kv_latent_rotary": rank + turned,
        "kv_heads": sizes.heads * (plain + value),
    }  # fmt: skip
    absent = {part.query} if query_rank else {part.compressed_query, part.query_heads}
    biased = {part.compressed_query, part.compressed, part.output} if config.get("attention_bias") else set()
    for shared in part.inputs:
        for layer in shared.layers:
            own = layer.name.rpartition(".")[2]
            if own not in absent:
                yield from _linears(SharedInput((layer,)), features, own in biased)
    if query_rank:
        yield from _norm(f"{part.module}.{part.query_norm}", (query_rank,), family).items()
    yield from _norm(f"{part.module}.{part.latent_norm}", (rank,), family).items()


def _mlp(config: Mapping[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of a block's MLP."""
    size = sizes.ffn if family.mlp.size == "intermediate_size" else config[family.mlp.size]
    for shared in family.mlp.inputs:
        features = {"hidden": sizes.hidden, "ffn": size, "gate_up": 2 * size}
        yield from _linears(shared, features, _says(config, family.mlp_bias))


def _experts(config: Mapping[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of a block's experts, of what chooses among them and of those that every token passes."""
    part = family.experts
    _, count = part.count(config)
    shared_size = part.shared_neurons(config)
    features = {"hidden": sizes.hidden, "expert": config[part.size], "shared": shared_size}
    for shared in part.inputs:
        if "*" not in shared.layers[0].name:
            yield from _linears(shared, features, _says(config, family.mlp_bias)) if shared_size else ()
            continue
        for number in range(count):
            layers = tuple(layer._replace(name=layer.name.replace("*", str(number))) for layer in shared.layers)
            yield from _linears(SharedInput(layers), features, part.biased)
    for name in part.plain:
        yield f"{part.module}.{name}.weight", (1 if part.shared and part.shared in name else count, sizes.hidden)
    if part.vector:
        yield f"{part.module}.{part.vector}", (part.vector_rows, count) if part.vector_rows else (count,)


#: The tensors of each part of a block.
_PARTS = {"attention": _attention, "recurrent": _recurrent, "mlp": _mlp, "experts": _experts}


def _linears(shared: SharedInput, features: dict[str, int], biased: bool) -> Iterator[tuple[str, Shape]]:
    for layer in shared.layers:
        yield f"{layer.name}.weight", (features[layer.outputs], features[layer.inputs])
        if biased:
            yield f"{layer.name}.bias", (features[layer.outputs],)


def _norm(name: str, shape: Shape, family: Family) -> dict[str, Shape]:
    parts = () if family.norm == "none" else ("weight", "bias") if family.norm.endswith(", b") else ("weight",)
    return {f"{name}.{part}": shape for part in parts}


def _says(config: dict[str, Any], said: Said) -> bool:
    return said if isinstance(said, bool) else bool(config.get(*said))
