"""Mamba, alone and between blocks with attention: Falcon, Bamba, Granite 4, Nemotron-H."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit, Logits
from trimtab.families.parts import Attention, Config, Experts, Mlp, NoAttention, Recurrent, State

_NO_SERVE = "the engine's cache holds no recurrent state"


def _first(config: Config) -> State:
    """Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"."""
    channels = int(config.get("expand", 2) * config["hidden_size"])
    return State(channels * config.get("conv_kernel", 4), channels * config.get("state_size", 16))


def _second(channels: int, groups: int, size: int, kernel: int) -> State:
    """Dao and Gu 2024, "Transformers are SSMs" (Mamba 2): its convolution sees what writes and what reads too."""
    return State((channels + 2 * groups * size) * kernel, channels * size)


def _of_mamba2(config: Config) -> State:
    channels = int(config.get("expand", 2) * config["hidden_size"])
    return _second(channels, config.get("n_groups", 8), config.get("state_size", 128), config.get("conv_kernel", 4))


def _of_nemotron(config: Config) -> State:
    channels = config.get("mamba_num_heads", 128) * config.get("mamba_head_dim", 64)
    groups = config.get("n_groups", config.get("mamba_n_groups", 8))
    return _second(channels, groups, config.get("ssm_state_size", 128), config.get("conv_kernel", 4))


def _of_bamba(config: Config) -> State:
    channels = int(config.get("mamba_expand", 2) * config["hidden_size"])
    return _second(channels, config.get("mamba_n_groups", 1), config.get("mamba_d_state", 256),
                   config.get("mamba_d_conv", 4))  # fmt: skip


def _alone(config: Config) -> dict[str, Any]:
    """A block is a mixer and nothing else, as wide as the recurrence."""
    return {"num_attention_heads": 1, "intermediate_size": int(config.get("expand", 2) * config["hidden_size"])}


def _nemotron_sizes(config: Config) -> dict[str, Any]:
    """Its blocks are counted by the list, or the letters, that say what each of them is."""
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()
    return {"num_hidden_layers": len(kinds)} if kinds else {}


#: What the recurrence forgets and adds by comes out of `x_proj` and `dt_proj`, a tenth of the weights: in 16 bits.
MAMBA = Family(
    "mamba",
    attention=NoAttention(),
    mlp=None,
    recurrent=Recurrent("mixer", _first, norm="norm", choices=("x_proj", "dt_proj")),
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    last_norm="backbone.norm_f",
    keep=("mixer.x_proj", "mixer.dt_proj"),
    sizes=_alone,
    pipeline_parallel=False,
    no_serve=_NO_SERVE,
)
#: NVIDIA's checkpoints in FP8 and FP4 leave attention as it is; it is in a tenth of the blocks.
NEMOTRON_H = Family(
    "nemotron_h",
    attention=Attention("mixer", "norm"),
    mlp=Mlp("mixer", "norm", gate=None),
    experts=Experts(
        "mixer", gate=None, shared="shared_experts", shared_size="moe_shared_expert_intermediate_size"
    ),
    recurrent=Recurrent("mixer", _of_nemotron, norm="norm"),
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    last_norm="backbone.norm_f",
    limits=(Limit("moe_latent_size", None, (None,), "and experts behind a projection are not known"),),
    aliases=(("backbone", "model"),),
    keep=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"),
    by_layer=("layers_block_type",),
    beside=("mtp.",),
    sizes=_nemotron_sizes,
    qkv_bias=False,
    pipeline_parallel=False,
    no_serve=_NO_SERVE,
)
BAMBA = Family(
    "bamba",
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    recurrent=Recurrent("mamba", _of_bamba),
    last_norm="model.final_layernorm",
    numbered=("attn_layer_indices",),
    pipeline_parallel=False,
    no_serve=_NO_SERVE,
)
GRANITE = Family(
    "granitemoehybrid",
    mlp=Mlp("shared_mlp", gate_up="input_linear", down="output_linear"),
    recurrent=Recurrent("mamba", _of_bamba),
    limits=(
        Limit("num_local_experts", 8, (0, None), "and experts that its files hold in one tensor are not taken apart"),
    ),
    attention_types=("full_attention", "linear_attention", "attention", "mamba"),
    sizes=lambda config: {"intermediate_size": config.get("shared_intermediate_size", 1024)},
    logits=lambda config: Logits(1 / config.get("logits_scaling", 1.0)),
    pipeline_parallel=False,
    no_serve=_NO_SERVE,
)
FAMILIES = (
    MAMBA,
    replace(MAMBA, model_type="falcon_mamba"),
    replace(MAMBA, model_type="mamba2", recurrent=Recurrent("mixer", _of_mamba2, norm="norm"), keep=()),
    NEMOTRON_H,
    BAMBA,
    GRANITE,
)
