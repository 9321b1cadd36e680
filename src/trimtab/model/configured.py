"""What a config.json says before tensors are looked at: sizes of a model, and whether its head is its embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.base.errors import InputError
from trimtab.families import TEXT_CONFIG, Family

#: Decoders whose embeddings are tied where config.json says nothing (transformers 5.14).
_TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "falcon", "falcon_mamba", "gemma",
    "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "lfm2",
    "lfm2_moe", "mamba", "minicpm3", "mpt", "opt", "smollm3", "starcoder2", "vaultgemma", "youtu",
}  # fmt: skip


class Sizes(NamedTuple):
    """What a config.json counts: blocks, hidden channels, neurons, heads, tokens of the vocabulary, positions."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int


def sizes_of(path: Path, config: Mapping[str, Any], family: Family) -> Sizes:
    """Returns the sizes of the model with this config.json, which lies at `path`.

    Raises:
        InputError: one is missing or no whole number above 0.
    """
    own = family.sizes(config)

    def number(key: str, default: int | None = None) -> int:
        value = {**config, **own}.get(key) or default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: {key} must be a whole number above 0, got {value!r}")
        return value

    layers, heads, hidden = (number(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    return Sizes(
        layers=layers,
        hidden=hidden,
        ffn=number("intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", family.head_dim or hidden // heads),
        vocabulary=number("vocab_size"),
        positions=number("max_position_embeddings", 2048),
    )


def experts_of(path: Path, config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Returns what a config.json says of a family's experts: how many, how many of a token, neurons of each.

    Raises:
        InputError: one is missing or no whole number above 0, or a token is given to more than there are.
    """
    part = family.experts
    counted, count = part.count(config)
    chosen, size = config.get(part.chosen), config.get(part.size)
    for field, value in ((counted, count), (part.chosen, chosen), (part.size, size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: {field} must be a whole number above 0, got {value!r}")
    if chosen > count:
        raise InputError(f"{path}: {part.chosen} is {chosen}, and {counted} only {count}; download it again")
    return count, chosen, size


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether config.json makes the output head the embedding, as transformers reads it: where it does not say, by
    the model type. What a wrapper does not say its text model may."""
    inner = config.get(TEXT_CONFIG)
    said = {**(inner if isinstance(inner, Mapping) else {}), **config}.get("tie_word_embeddings")
    return config.get("model_type") in _TIED_BY_DEFAULT if said is None else bool(said)
