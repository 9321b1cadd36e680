"""LFM2: short gated convolutions, with attention in a few blocks; and LFM2 with experts behind a few dense blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts, Mlp, Recurrent, State


def _sizes(config: Config) -> dict[str, Any]:
    """Its config may count neurons before they are adjusted: two thirds, times a factor, in whole multiples."""
    neurons = config.get("block_ff_dim", config.get("intermediate_size", 12288))
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = config.get("block_multiple_of", 256)
        factor = config.get("block_ffn_dim_multiplier", 1.0)
        neurons = int(2 * neurons / 3) if factor is None else int(factor * int(2 * neurons / 3))
        neurons = multiple * ((neurons + multiple - 1) // multiple)
    return {"intermediate_size": neurons}


LFM2 = Family(
    "lfm2",
    attention=Attention(norm="operator_norm", output="out_proj", head_norms=("q_layernorm", "k_layernorm")),
    mlp=Mlp("feed_forward", "ffn_norm", gate="w1", up="w3", down="w2"),
    recurrent=Recurrent(
        "conv", lambda config: State(config["hidden_size"] * config.get("conv_L_cache", 3)), norm="operator_norm"
    ),
    last_norm="model.embedding_norm",
    limits=(Limit("tie_embedding", True, (True,), "and its output head is known as its embedding alone"),),
    numbered=("full_attn_idxs",),
    attention_types=("full_attention", "conv"),
    sizes=_sizes,
    qkv_bias=False,
    pipeline_parallel=False,
    no_serve="the engine's cache holds no recurrent state",
)
FAMILIES = (
    LFM2,
    replace(
        LFM2,
        model_type="lfm2_moe",
        experts=Experts("feed_forward", gate="w1", up="w3", down="w2"),
        numbered=(),
        first_blocks=("num_dense_layers",),
        sizes=lambda config: {},
    ),
)
