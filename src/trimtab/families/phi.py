"""Phi: Phi-1, 1.5 and 2, whose attention and MLP read one norm; Phi-3 and 4, Llama with its layers stored as one."""

from __future__ import annotations

from trimtab.families.family import Family
from trimtab.families.parts import Attention, Mlp

PHI = Family(
    "phi",
    attention=Attention(
        norm=None,
        output="dense",
        head_norms=("q_layernorm", "k_layernorm"),
        has_head_norms=("qk_layernorm", False),
    ),
    mlp=Mlp(norm=None, gate=None, up="fc1", down="fc2"),
    norm="w, b",
    last_norm="model.final_layernorm",
    norms=("input_layernorm",),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    head_bias=True,
)
PHI3 = Family(
    "phi3",
    attention=Attention(qkv="qkv_proj"),
    mlp=Mlp(gate_up="gate_up_proj"),
    qkv_bias=False,
    no_serve="its keys and values come out of qkv_proj, with the queries",
)
FAMILIES = (PHI, PHI3)
