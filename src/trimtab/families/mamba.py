"""Mamba, alone, between blocks with attention, and beside attention: Falcon, Bamba, Nemotron-H, Falcon-H1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit, Logits
from trimtab.families.parts import Attention, Config, Experts, Mlp, NoAttention, Recurrent, State

NO_SERVE = "the engine's cache holds no recurrent state"


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


def state_of_bamba(config: Config) -> State:
    """A Mamba 2 under Bamba's names of its sizes, which Granite 4 has too."""
    channels = int(config.get("mamba_expand", 2) * config["hidden_size"])
    return _second(channels, config.get("mamba_n_groups", 1), config.get("mamba_d_state", 256),
                   config.get("mamba_d_conv", 4))  # fmt: skip


def _of_falcon(config: Config) -> State:
    """As `state_of_bamba`, but it may have fewer channels than the block's width asks for."""
    channels = config.get("mamba_d_ssm", 1024) or int(config.get("mamba_expand", 2) * config["hidden_size"])
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
    no_serve=NO_SERVE,
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
    no_serve=NO_SERVE,
)
BAMBA = Family(
    "bamba",
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    recurrent=Recurrent("mamba", state_of_bamba),
    last_norm="model.final_layernorm",
    numbered=("attn_layer_indices",),
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
#: Attention and a Mamba read one norm, and their outputs are added; what each is multiplied by is in the model.
FALCON_H1 = Family(
    "falcon_h1",
    attention=Attention(norm=None),
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    recurrent=Recurrent("mamba", _of_falcon, norm=None),
    last_norm="model.final_layernorm",
    norms=("input_layernorm", "pre_ff_layernorm"),
    logits=lambda config: Logits(config.get("lm_head_multiplier", 1.0)),
    output_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
FAMILIES = (
    MAMBA,
    replace(MAMBA, model_type="falcon_mamba"),
    replace(MAMBA, model_type="mamba2", recurrent=Recurrent("mixer", _of_mamba2, norm="norm"), keep=()),
    NEMOTRON_H,
    BAMBA,
    FALCON_H1,
)
