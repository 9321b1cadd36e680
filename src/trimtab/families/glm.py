"""GLM-4: gate and up in one layer, rotary embeddings for half a head, later with norms behind its parts; and experts.

GLM-4.5 and dots.llm1 are Llama with experts, behind a few blocks with an MLP.
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family
from trimtab.families.parts import Attention, Experts, Mlp

GLM = Family("glm", mlp=Mlp(gate_up="gate_up_proj"), head_dim=128, qkv_bias=("attention_bias", True))
_BOTH = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
GLM4_MOE = Family(
    "glm4_moe",
    attention=Attention(head_norms=("q_norm", "k_norm"), has_head_norms=("use_qk_norm", False)),
    experts=Experts(
        shared="shared_experts",
        shared_size="n_shared_experts",
        vector="gate.e_score_correction_bias",
        blocks=lambda config: range(config["first_k_dense_replace"], config["num_hidden_layers"]),
    ),
    first_blocks=("first_k_dense_replace",),
    next_token_blocks="num_nextn_predict_layers",
)
FAMILIES = (
    GLM,
    replace(GLM, model_type="glm4", norms=_BOTH),
    GLM4_MOE,
    replace(
        GLM4_MOE,
        model_type="dots1",
        attention=Attention(head_norms=("q_norm", "k_norm")),
        output_bias=("attention_bias", False),
        first_blocks=("first_k_dense_replace", "max_window_layers"),
        next_token_blocks="",
    ),
)
