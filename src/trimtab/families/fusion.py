"""Which linear layers read the same input, and which norm makes it: by the names that a model's family has.

Engines fuse such layers into one product, so they share a format, an input scale and a channel scale; and what
multiplies their input can be folded into the norm. A layer that the names do not place is a group by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from trimtab import families

_LISTS = "|".join(sorted(re.escape(blocks) for blocks in {family.blocks for family in families.BY_TYPE.values()}))
_BLOCK = re.compile(rf"^((?:{_LISTS})\.(\d+))\.(.+)$")


class Group(NamedTuple):
    """Layers with one input, in the order of their names; `norm` is the module whose weight it may be scaled by, or
    None: no norm stands directly before these layers and no others, or it does not just multiply by its weight."""

    layers: tuple[str, ...]
    norm: str | None = None


def groups(layers: Iterable[str], model_type: str) -> list[Group]:
    """Returns the layers in groups, ordered by block and name; each layer stands in exactly one.

    Raises:
        InputError: no family describes the model type.
    """
    family = families.named(model_type)
    found: dict[tuple[int, str], Group] = {}
    for layer in layers:
        number, place = family.place(layer)
        shared = None if number is None else family.shared_input(place)
        block = f"{family.blocks}.{number}"
        key = (-1 if number is None else number, f"{block}.{shared.layers[0].name}" if shared else layer)
        norm = f"{block}.{shared.norm}" if shared and shared.norm and family.folds else None
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
