"""ERNIE 4.5 with experts in the blocks of a span; its router chooses by a bias that it does not weigh by."""

from __future__ import annotations

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Config, Experts


def _span(config: Config) -> range:
    """The blocks with experts: from the first one to the last one, which -1 makes the model's last."""
    last, blocks = config.get("moe_layer_end_index", -1), config["num_hidden_layers"]
    return range(config.get("moe_layer_start_index", 1), blocks if last in (None, -1) else last + 1)


ERNIE_MOE = Family(
    "ernie4_5_moe",
    experts=Experts(
        shared="shared_experts",
        shared_size="moe_num_shared_experts",
        vector="moe_statics.e_score_correction_bias",
        vector_rows=1,
        blocks=_span,
        chosen="moe_k",
    ),
    limits=(
        Limit("use_bias", False, (False, None), "and its experts are known without biases alone"),
        Limit("moe_layer_interval", 1, (1, None), "and experts in every block of a span alone are known"),
    ),
    aliases=(("model.layers.*.mlp.moe_statics", "model.layers.*.mlp.gate.moe_statics"),),
    first_blocks=("moe_layer_start_index",),
    last_blocks=("moe_layer_end_index",),
    beside=("model.mtp_",),
    qkv_bias=False,
)
FAMILIES = (ERNIE_MOE,)
