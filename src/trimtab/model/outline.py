"""The facts of a Llama-like model by its config.json alone, for planning before its weights are anywhere near."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.families import Family
from trimtab.model import low_precision
from trimtab.model.facts import ModelFacts, facts_of
from trimtab.model.headers import Tensor

#: Model types whose tensors follow from the config as `_shapes` lays them out.
MODEL_TYPES = tuple(family.model_type for family in families.BY_TYPE.values() if family.width)


def outline(path: str | Path) -> ModelFacts:
    """Returns the facts of the model whose config.json this is, as if its weights were there in 16 bits.

    Raises:
        InputError: no config of a model whose shapes are known, or one in low precision that is not read.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_bytes())
        config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no config.json of a model ({error.__class__.__name__}: {error})") from None
    family = families.of(config, str(path))
    if not family.width:
        known = ", ".join(MODEL_TYPES)
        what = f"the shapes of a '{family.model_type}' do not follow from its config ({known}'s do)"
        raise InputError(f"{path}: {what}; give the whole model")
    low_precision.declared(str(path), config)
    try:
        shapes = dict(_shapes(config, family))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: lacks {error}; give the model's own config.json") from None
    tensors = {name: Tensor(name, "BF16", shape, 0, 2 * math.prod(shape)) for name, shape in shapes.items()}
    return facts_of(path.parent, config, tensors)


def _shapes(config: dict[str, Any], family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    attention = family.attention
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    sizes = {"hidden": hidden, "attention": heads * head, "kv": keys, "ffn": inner}
    biased = config.get(family.qkv_bias) if isinstance(family.qkv_bias, str) else family.qkv_bias
    yield f"{family.embedding}.weight", (config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        block = f"{family.blocks}.{n}"
        for layer in family.layers.values():
            yield f"{block}.{layer.name}.weight", (sizes[layer.outputs], sizes[layer.inputs])
            if biased and layer in attention.inputs[0].layers:
                yield f"{block}.{layer.name}.bias", (sizes[layer.outputs],)
        for norm in attention.head_norms:
            yield f"{block}.{attention.module}.{norm}.weight", (head,)
        for norm in (attention.norm, family.mlp.norm):
            yield f"{block}.{norm}.weight", (hidden,)
    yield f"{family.last_norm}.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield f"{family.head}.weight", (config["vocab_size"], hidden)
