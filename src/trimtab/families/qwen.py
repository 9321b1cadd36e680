"""Qwen2 and Qwen3: Llama with biases before attention, or with norms of each head of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Attention, Family

#: `max_window_layers` counts the blocks without a window, from the first; `layer_types`, where it is given, rules.
QWEN2 = Family(
    "qwen2", first_blocks=("max_window_layers",), qkv_bias=True, llama_block=True, width=True, tensor_parallel=True
)
FAMILIES = (
    QWEN2,
    replace(
        QWEN2,
        model_type="qwen3",
        attention=Attention(head_norms=("q_norm", "k_norm")),
        head_dim=128,
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
    ),
)
