"""Cohere's Command: attention and MLP read one norm, and the logits are multiplied behind the output head."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Logits
from trimtab.families.parts import Attention, Config, Mlp


def _whole_context(config: Config) -> list[int]:
    """Command R7B and later turn queries and keys by position in blocks with a window alone."""
    return [n for n, kind in enumerate(config.get("layer_types") or ()) if kind == "full_attention"]


COHERE = Family(
    "cohere",
    attention=Attention(
        norm=None, head_norms=("q_norm", "k_norm"), has_head_norms=("use_qk_norm", False), head_norms_span="each head"
    ),
    mlp=Mlp(norm=None),
    norms=("input_layernorm",),
    logits=lambda config: Logits(scale=config.get("logit_scale", 0.0625)),
    output_bias=("attention_bias", False),
    tensor_parallel=True,
)
FAMILIES = (
    COHERE,
    replace(COHERE, model_type="cohere2", attention=Attention(norm=None), nope=_whole_context),
)
