"""Cohere's Command: attention and MLP read one norm, and the logits are multiplied behind the output head."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Mlp


def _whole_context(config: Config) -> list[int]:
    """Command R7B and later turn queries and keys by position in blocks with a window alone."""
    return [n for n, kind in enumerate(config.get("layer_types") or ()) if kind == "full_attention"]


COHERE = Family(
    "cohere",
    attention=Attention(norm=None),
    mlp=Mlp(norm=None),
    limits=(
        Limit("logit_scale", 0.0625, (1, None), "and the engine scores with what the output head gives alone"),
        Limit("use_qk_norm", False, (False,), "and norms of queries and keys with a row a head are not known"),
    ),
    tensor_parallel=True,
)
FAMILIES = (COHERE, replace(COHERE, model_type="cohere2", nope=_whole_context))
