"""Mamba alone, between blocks with attention, and beside it: Falcon, Bamba, Nemotron-H, Jamba, Falcon-H1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit, Logits
from trimtab.families.parts import Attention, Config, Experts, Mlp, NoAttention
from trimtab.families.state_space import (
    mixer,
    of_bamba,
    of_falcon_h1,
    of_jamba,
    of_mamba,
    of_mamba2,
    of_nemotron,
)

NO_SERVE = "the engine's cache holds no recurrent state"


def _alone(config: Config) -> dict[str, Any]:
    """A block is a mixer and nothing else, as wide as the recurrence."""
    return {"num_attention_heads": 1, "intermediate_size": int(config.get("expand", 2) * config["hidden_size"])}


def _nemotron_sizes(config: Config) -> dict[str, Any]:
    """Its blocks are counted by the list, or the letters, that say what each of them is."""
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()
    return {"num_hidden_layers": len(kinds)} if kinds else {}


#: What a block of Nemotron-H is, by its letter and by its names.
_KINDS = {"M": "recurrent", "*": "attention", "-": "mlp", "E": "experts", "mamba": "recurrent",
          "linear_attention": "recurrent", "full_attention": "attention", "attention": "attention", "mlp": "mlp",
          "moe": "experts"}  # fmt: skip


def _nemotron_kinds(config: Config) -> list[str]:
    return [_KINDS[kind] for kind in config.get("layers_block_type") or config["hybrid_override_pattern"]]


def _every(period: str, offset: str, config: Config, by_default: tuple[int, int]) -> list[int]:
    """The blocks that Jamba's fields count off: one in each period, from an offset."""
    step, first = config.get(period, by_default[0]), config.get(offset, by_default[1])
    return [block for block in range(config["num_hidden_layers"]) if block % step == first]


def _without_attention(config: Config) -> list[int]:
    attending = _every("attn_layer_period", "attn_layer_offset", config, (8, 4))
    return [block for block in range(config["num_hidden_layers"]) if block not in attending]


def _with_experts(config: Config) -> list[int]:
    there = config.get("num_experts", 16) > 1
    return _every("expert_layer_period", "expert_layer_offset", config, (2, 1)) if there else []


def _of_bamba(config: Config) -> list[int]:
    """All blocks but those that are listed as attention."""
    attending = config.get("attn_layer_indices") or ()
    return [block for block in range(config["num_hidden_layers"]) if block not in attending]


#: What the recurrence forgets and adds by comes out of these, a tenth of the weights: in 16 bits.
_CHOICES = ("x_proj", "dt_proj")
MAMBA = Family(
    "mamba",
    attention=NoAttention(),
    mlp=None,
    recurrent=mixer("mixer", of_mamba, norm="norm", choices=_CHOICES),
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    last_norm="backbone.norm_f",
    norms=("norm",),
    keep=tuple(f"mixer.{name}" for name in _CHOICES),
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
        "mixer",
        gate=None,
        shared="shared_experts",
        shared_size="moe_shared_expert_intermediate_size",
        vector="gate.e_score_correction_bias",
    ),
    recurrent=mixer("mixer", of_nemotron, norm="norm"),
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    last_norm="backbone.norm_f",
    norms=("norm",),
    alone=_nemotron_kinds,
    limits=(Limit("moe_latent_size", None, (None,), "and experts behind a projection are not known"),),
    aliases=(("backbone", "model"),),
    keep=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"),
    by_layer=("layers_block_type",),
    beside=("mtp.",),
    sizes=_nemotron_sizes,
    head_dim=128,
    qkv_bias=False,
    mlp_bias=("mlp_bias", False),
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
BAMBA = Family(
    "bamba",
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    recurrent=mixer("mamba", of_bamba, blocks=_of_bamba),
    last_norm="model.final_layernorm",
    norms=("input_layernorm", "pre_ff_layernorm"),
    numbered=("attn_layer_indices",),
    output_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
#: Attention and a Mamba read one norm, and their outputs are added; what each is multiplied by is in the model.
FALCON_H1 = Family(
    "falcon_h1",
    attention=Attention(norm=None),
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    recurrent=mixer("mamba", of_falcon_h1, norm=None, beside_attention=True),
    last_norm="model.final_layernorm",
    norms=("input_layernorm", "pre_ff_layernorm"),
    logits=lambda config: Logits(config.get("lm_head_multiplier", 1.0)),
    factors=("mup_vector",),
    output_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
JAMBA = Family(
    "jamba",
    mlp=Mlp("feed_forward", "pre_ff_layernorm"),
    experts=Experts("feed_forward", plain=("router",), size="intermediate_size", blocks=_with_experts),
    recurrent=mixer("mamba", of_jamba, choices=_CHOICES, blocks=_without_attention),
    last_norm="model.final_layernorm",
    norms=("input_layernorm", "pre_ff_layernorm"),
    keep=tuple(f"mamba.{name}" for name in _CHOICES),
    fixed_depth="counts off by periods which blocks have attention and which experts (attn_layer_period)",
    qkv_bias=False,
    pipeline_parallel=False,
    no_serve=NO_SERVE,
)
FAMILIES = (
    MAMBA,
    replace(MAMBA, model_type="falcon_mamba"),
    replace(MAMBA, model_type="mamba2", recurrent=mixer("mixer", of_mamba2, norm="norm"), keep=()),
    NEMOTRON_H,
    BAMBA,
    FALCON_H1,
    JAMBA,
)
