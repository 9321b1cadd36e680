"""Which linear layers read the same input, and which norm makes it: by the names of Llama's family.

Engines fuse such layers into one product, so they share a format, an input scale and a channel scale; and what
multiplies their input can be folded into the norm. A layer that the names do not place is a group by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

#: The layers of a group by their place in the block, and the norm before them.
_GROUPS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.qkv_proj",), "input_layernorm"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.gate_up_proj",), "post_attention_layernorm"),
)
#: Model types whose norms multiply by their weight and stand directly before these layers. Elsewhere a norm of
#: that name may stand behind the layer (OLMo 2) or multiply by one plus its weight (Gemma).
_PRE_NORM = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"})
_BLOCK = re.compile(r"^(.*\.(?:layers|h|blocks)\.(\d+))\.(.+)$")


class Group(NamedTuple):
    """Layers with one input, in the order of their names; `norm` is the module whose output it is, or None."""

    layers: tuple[str, ...]
    norm: str | None = None


def groups(layers: Iterable[str], model_type: str) -> list[Group]:
    """Returns the layers in groups, ordered by block and name; each layer stands in exactly one."""
    found: dict[tuple[int, str], Group] = {}
    for layer in layers:
        match = _BLOCK.match(layer)
        prefix, number, place = (match[1], int(match[2]), match[3]) if match else ("", -1, layer)
        members, norm = next(((m, n) for m, n in _GROUPS if match and place in m), ((), None))
        key = (number, f"{prefix}.{members[0]}" if members else layer)
        norm = f"{prefix}.{norm}" if norm and model_type in _PRE_NORM else None
        found[key] = Group((*found[key].layers, layer) if key in found else (layer,), norm)
    return [Group(tuple(sorted(group.layers)), group.norm) for _, group in sorted(found.items())]


def block_of(name: str) -> int | None:
    """Returns the number of the block that a module or tensor belongs to, or None."""
    match = _BLOCK.match(name)
    return int(match[2]) if match else None


def in_block(name: str, number: int) -> str:
    """Returns the name of the same module or tensor in another block; of one that belongs to a block."""
    match = _BLOCK.match(name)
    return f"{match[1].removesuffix(match[2])}{number}.{match[3]}"
