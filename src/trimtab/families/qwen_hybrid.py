"""Qwen3-Next and Qwen3.5: three blocks with a gated delta net for each one with attention, whose output is gated.

Qwen's own checkpoints in FP8 round the large projections of a delta net, and leave those that choose what it forgets
and adds as they are; the blocks of `mtp.…`, which predict further tokens, they leave as they are too.
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts, Recurrent, State


def _state(config: Config) -> State:
    """Yang et al. 2024, "Gated Delta Networks": a matrix for each head of values."""
    key_heads, key = config.get("linear_num_key_heads", 16), config.get("linear_key_head_dim", 128)
    value_heads, value = config.get("linear_num_value_heads", 32), config.get("linear_value_head_dim", 128)
    channels = 2 * key_heads * key + value_heads * value
    return State(channels * config.get("linear_conv_kernel_dim", 4), value_heads * key * value)


#: As of Qwen3 MoE: a step above 1 would take experts from blocks by their place.
_STEP = Limit("decoder_sparse_step", 1, (1,), "and only blocks that mlp_only_layers names may have no experts")
_EXPERTS = Experts(
    shared="shared_expert", plain=("gate", "shared_expert_gate"), shared_size="shared_expert_intermediate_size"
)
QWEN3_NEXT = Family(
    "qwen3_next",
    attention=Attention(head_norms=("q_norm", "k_norm"), gated=True),
    experts=_EXPERTS,
    recurrent=Recurrent("linear_attn", _state, projections=("in_proj_qkvz", "in_proj_ba")),
    norm="1 + w",
    limits=(_STEP,),
    keep=("linear_attn.in_proj_ba",),
    numbered=("mlp_only_layers",),
    beside=("mtp.",),
    attention_types=("full_attention", "linear_attention"),
    pipeline_parallel=False,
    no_serve="the engine's cache holds no recurrent state",
)
QWEN3_5 = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    experts=None,
    recurrent=Recurrent(
        "linear_attn", _state, projections=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    ),
    limits=(),
    keep=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    numbered=(),
)
FAMILIES = (
    QWEN3_NEXT,
    QWEN3_5,
    replace(QWEN3_5, model_type="qwen3_5_moe_text", mlp=None, experts=_EXPERTS),
)
