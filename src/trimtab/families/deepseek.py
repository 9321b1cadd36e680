"""DeepSeek V2 and V3: keys and values kept compressed (MLA), and experts behind a few blocks with an MLP."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family
from trimtab.families.parts import Experts, LatentAttention

_ATTENTION = LatentAttention()
_EXPERTS = Experts(
    shared="shared_experts",
    shared_size="n_shared_experts",
    vector="gate.e_score_correction_bias",
    blocks=lambda config: range(config["first_k_dense_replace"], config["num_hidden_layers"]),
)
#: NVIDIA's checkpoints in FP4 leave attention as it is: its layers are a small part of the model.
DEEPSEEK = Family(
    "deepseek_v3",
    attention=_ATTENTION,
    experts=_EXPERTS,
    keep=tuple(layer.name for shared in _ATTENTION.inputs for layer in shared.layers),
    first_blocks=("first_k_dense_replace",),
    next_token_blocks="num_nextn_predict_layers",
    no_serve="the engine's cache has one size for keys and values, and its keys are longer",
)
FAMILIES = (
    DEEPSEEK,
    replace(DEEPSEEK, model_type="deepseek_v2", experts=replace(_EXPERTS, vector=""), next_token_blocks=""),
)
