"""The facts of a Llama-like model by its config.json alone, for planning before its weights are anywhere near."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.model import ModelFacts, Tensor, facts_of

#: Model types whose tensors follow from the config as `_shapes` lays them out.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def outline(path: str | Path) -> ModelFacts:
    """Returns the facts of the model whose config.json this is, as if its weights were there in 16 bits.

    Raises:
        InputError: no config of a model whose shapes are known.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_bytes())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no config.json of a model ({error.__class__.__name__}: {error})") from None
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: the shapes of a '{model_type}' are not known ({known} are); give the whole model")
    try:
        shapes = dict(_shapes(config))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: lacks {error}; give the model's own config.json") from None
    tensors = {name: Tensor(name, "BF16", shape, 0, 2 * math.prod(shape)) for name, shape in shapes.items()}
    return facts_of(path.parent, config, tensors)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    biased = config["model_type"] == "qwen2" or config.get("attention_bias")
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        block = f"model.layers.{n}"
        for part, rows in (("q", heads * head), ("k", keys), ("v", keys)):
            yield f"{block}.self_attn.{part}_proj.weight", (rows, hidden)
            if biased:
                yield f"{block}.self_attn.{part}_proj.bias", (rows,)
        yield f"{block}.self_attn.o_proj.weight", (hidden, heads * head)
        if config["model_type"] == "qwen3":
            yield f"{block}.self_attn.q_norm.weight", (head,)
            yield f"{block}.self_attn.k_norm.weight", (head,)
        for part in ("gate", "up"):
            yield f"{block}.mlp.{part}_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        for part in ("input", "post_attention"):
            yield f"{block}.{part}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)
