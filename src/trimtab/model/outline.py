"""The facts of a model by its config.json alone, for planning before its weights are anywhere near.

Names and shapes of its tensors follow from what its family says of its layers, norms and biases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.families import Attention, Family, Mlp
from trimtab.families.parts import Said, Shape
from trimtab.model import low_precision
from trimtab.model.configured import Sizes, sizes_of, ties_embeddings
from trimtab.model.facts import ModelFacts, facts_of
from trimtab.model.headers import Tensor

#: Model types whose tensors follow from the config: those whose blocks are attention and an MLP, all alike, and alone.
MODEL_TYPES = tuple(
    name
    for name, family in families.BY_TYPE.items()
    if (type(family.attention), type(family.mlp), family.experts, family.wrapper) == (Attention, Mlp, None, None)
)


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
    if family.model_type not in MODEL_TYPES:
        what = f"the shapes of a '{family.model_type}' do not follow from its config by a rule that is known"
        raise InputError(f"{path}: {what}; give the whole model")
    low_precision.declared(str(path), config)
    try:
        found = shapes(config, family, path)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: lacks {error}; give the model's own config.json") from None
    tensors = {name: Tensor(name, "BF16", shape, 0, 2 * math.prod(shape)) for name, shape in found.items()}
    return facts_of(path.parent, config, tensors)


def shapes(config: dict[str, Any], family: Family, path: Path) -> dict[str, Shape]:
    """Returns the shape of each tensor of a model by its name, as its checkpoint holds it.

    Raises:
        InputError, KeyError: the config, which lies at `path`, lacks a size.
    """
    sizes = sizes_of(path, config, family)
    if not {**config, **family.sizes(config)}.get("intermediate_size"):  # weights would tell it
        raise KeyError("intermediate_size")
    vocabulary = (sizes.vocabulary, sizes.hidden)
    found: dict[str, Shape] = {f"{family.embedding}.weight": vocabulary}
    found |= _norm(family.last_norm, (sizes.hidden,), family)
    if not ties_embeddings(config):
        found[f"{family.head}.weight"] = vocabulary
    if _says(config, family.head_bias):
        found[f"{family.head}.bias"] = vocabulary[:1]
    in_block = dict(_block(config, family, sizes))
    others = family.others(config, sizes)
    in_block |= {name: shape for name, shape in others.items() if "{}" in name}
    for number in range(sizes.layers):
        found |= {name.format(number): shape for name, shape in in_block.items()}
    found |= {name: shape for name, shape in others.items() if "{}" not in name}
    return {name: shape for name, shape in found.items() if shape is not None}


def _block(config: dict[str, Any], family: Family, sizes: Sizes) -> Iterator[tuple[str, Shape]]:
    """The tensors of a block, with {} for its number."""
    attention, block = family.attention, f"{family.blocks}.{{}}"
    heads, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    features = {"hidden": sizes.hidden, "attention": heads, "kv": kv, "qkv": heads + 2 * kv, "ffn": sizes.ffn,
                "gate_up": 2 * sizes.ffn}  # fmt: skip
    biases = {shared: family.mlp_bias for shared in family.mlp.inputs}
    biases |= zip(attention.inputs, (family.qkv_bias, family.output_bias), strict=True)
    for shared, bias in biases.items():
        for layer in shared.layers:
            yield f"{block}.{layer.name}.weight", (features[layer.outputs], features[layer.inputs])
            if _says(config, bias):
                yield f"{block}.{layer.name}.bias", (features[layer.outputs],)
    for norm in family.norms(config) if callable(family.norms) else family.norms:
        yield from _norm(f"{block}.{norm}", (sizes.hidden,), family).items()
    if _says(config, attention.has_head_norms):
        for norm, count in zip(attention.norms_of_heads, (sizes.heads, sizes.kv_heads), strict=False):
            size = sizes.head_dim
            shape = {"head": (size,), "each head": (count, size), "heads": (count * size,)}[attention.head_norms_span]
            yield from _norm(f"{block}.{norm}", shape, family).items()


def _norm(name: str, shape: Shape, family: Family) -> dict[str, Shape]:
    parts = () if family.norm == "none" else ("weight", "bias") if family.norm.endswith(", b") else ("weight",)
    return {f"{name}.{part}": shape for part in parts}


def _says(config: dict[str, Any], said: Said) -> bool:
    return said if isinstance(said, bool) else bool(config.get(*said))
