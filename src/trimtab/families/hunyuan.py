"""Hunyuan with experts in every block, beside one MLP that all tokens pass; a config may list its sizes by block."""

from __future__ import annotations

from typing import Any

from trimtab.families.family import Family
from trimtab.families.parts import Attention, Config, Experts

#: Fields that are a number, or a list with one for each block.
_BY_BLOCK = ("moe_topk", "num_experts", "moe_intermediate_size", "num_shared_expert")


def _sizes(config: Config) -> dict[str, Any]:
    """One number for all blocks where a list has no other; another list stays, and is refused as no number."""
    lists = {name: config[name] for name in _BY_BLOCK if isinstance(config.get(name), list)}
    return {name: value[0] for name, value in lists.items() if len(set(value)) == 1}


HUNYUAN_MOE = Family(
    "hunyuan_v1_moe",
    attention=Attention(head_norms=("query_layernorm", "key_layernorm")),
    mlp=None,
    experts=Experts(
        shared="shared_mlp",
        plain=("gate.wg",),
        chosen="moe_topk",
        size="intermediate_size",
        shared_size="intermediate_size",
    ),
    by_layer=("layer_types", *_BY_BLOCK),
    sizes=_sizes,
    output_bias=("attention_bias", False),
)
FAMILIES = (HUNYUAN_MOE,)
