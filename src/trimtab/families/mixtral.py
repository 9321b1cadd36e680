"""Mixtral, and what is built like it: experts in every block, named w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family
from trimtab.families.parts import Attention, Experts

_EXPERTS = Experts(
    module="block_sparse_moe", gate="w1", up="w3", down="w2", size="intermediate_size"
)
_RENAMED = ("model.layers.*.block_sparse_moe", "model.layers.*.mlp")
MIXTRAL = Family("mixtral", mlp=None, experts=_EXPERTS, aliases=(_RENAMED,), qkv_bias=False)
FAMILIES = (
    MIXTRAL,
    replace(
        MIXTRAL,
        model_type="phimoe",
        norm="w, b",
        aliases=(_RENAMED, ("model.layers.*.block_sparse_moe.gate", "model.layers.*.mlp.router")),
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
        head_bias=("lm_head_bias", False),
    ),
    replace(
        MIXTRAL,
        model_type="minimax_m2",
        attention=Attention(head_norms=("q_norm", "k_norm"), head_norms_span="heads"),
        experts=replace(_EXPERTS, vector="e_score_correction_bias"),
        head_dim=128,
    ),
)
