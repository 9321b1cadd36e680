"""GLM-4: gate and up in one layer, rotary embeddings for half a head; the later one with norms behind its parts too."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Mlp

GLM = Family("glm", mlp=Mlp(gate_up="gate_up_proj"), head_dim=128, qkv_bias=("attention_bias", True))
_BOTH = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
FAMILIES = (GLM, replace(GLM, model_type="glm4", norms=_BOTH))
