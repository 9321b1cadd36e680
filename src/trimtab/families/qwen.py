"""Qwen2 and Qwen3: Llama with biases before attention, or with norms of each head; and both with experts."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts

#: `max_window_layers` counts the blocks without a window, from the first; `layer_types`, where it is given, rules.
QWEN2 = Family(
    "qwen2", first_blocks=("max_window_layers",), qkv_bias=True, llama_block=True, width=True, tensor_parallel=True
)
_HEAD_NORMS = Attention(head_norms=("q_norm", "k_norm"))
#: `mlp_only_layers` are the blocks with an MLP; a step above 1 would make others such, by their place.
_STEP = Limit("decoder_sparse_step", 1, (1,), "and only blocks that mlp_only_layers names may have no experts")


def _with_experts(config: Config) -> list[int]:
    return [n for n in range(config["num_hidden_layers"]) if n not in (config.get("mlp_only_layers") or ())]


_QWEN2_MOE = replace(
    QWEN2,
    model_type="qwen2_moe",
    experts=Experts(
        shared="shared_expert",
        plain=("gate", "shared_expert_gate"),
        shared_size="shared_expert_intermediate_size",
        blocks=_with_experts,
    ),
    limits=(_STEP,),
    numbered=("mlp_only_layers",),
    qkv_bias=("qkv_bias", True),
    llama_block=False,
    width=False,
    tensor_parallel=False,
)
FAMILIES = (
    QWEN2,
    replace(
        QWEN2,
        model_type="qwen3",
        attention=_HEAD_NORMS,
        head_dim=128,
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
    ),
    _QWEN2_MOE,
    replace(
        _QWEN2_MOE,
        model_type="qwen3_moe",
        attention=_HEAD_NORMS,
        experts=Experts(blocks=_with_experts),
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
    ),
)
