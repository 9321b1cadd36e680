"""LFM2: short gated convolutions, with attention in a few blocks; and LFM2 with experts behind a few dense blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts, Mlp, Shape
from trimtab.families.recurrent import Recurrent, State, listed


def _sizes(config: Config) -> dict[str, Any]:
    """Its config may count neurons before they are adjusted: two thirds, times a factor, in whole multiples."""
    neurons = config.get("block_ff_dim", config.get("intermediate_size", 12288))
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = config.get("block_multiple_of", 256)
        factor = config.get("block_ffn_dim_multiplier", 1.0)
        neurons = int(2 * neurons / 3) if factor is None else int(factor * int(2 * neurons / 3))
        neurons = multiple * ((neurons + multiple - 1) // multiple)
    return {"intermediate_size": neurons}


def _shapes(config: Config) -> dict[str, Shape]:
    """A short convolution between two gates."""
    hidden, kernel = config["hidden_size"], config.get("conv_L_cache", 3)
    found = {
        "in_proj.weight": (3 * hidden, hidden), "conv.weight": (hidden, 1, kernel), "out_proj.weight": (hidden, hidden)
    }  # fmt: skip
    biased = ("in_proj", "conv", "out_proj") if config.get("conv_bias") else ()
    return found | {f"{name}.bias": found[f"{name}.weight"][:1] for name in biased}


def _convolutions(config: Config) -> list[int]:
    """Where no list says which blocks these are, those that no list says have attention; without either, none."""
    attending = config.get("full_attn_idxs")
    blocks = range(config["num_hidden_layers"])
    found = listed(config)
    return [n for n in blocks if attending is not None and n not in attending] if found is None else found


LFM2 = Family(
    "lfm2",
    attention=Attention(norm="operator_norm", output="out_proj", head_norms=("q_layernorm", "k_layernorm")),
    mlp=Mlp("feed_forward", "ffn_norm", gate="w1", up="w3", down="w2"),
    recurrent=Recurrent(
        "conv",
        lambda config: State(config["hidden_size"] * config.get("conv_L_cache", 3)),
        _shapes,
        norm="operator_norm",
        blocks=_convolutions,
    ),
    norms=("operator_norm", "ffn_norm"),
    last_norm="model.embedding_norm",
    limits=(Limit("tie_embedding", True, (True,), "and its output head is known as its embedding alone"),),
    numbered=("full_attn_idxs",),
    attention_types=("full_attention", "conv"),
    sizes=_sizes,
    qkv_bias=False,
    pipeline_parallel=False,
    no_serve="the engine's cache holds no recurrent state",
)
FAMILIES = (
    LFM2,
    replace(
        LFM2,
        model_type="lfm2_moe",
        experts=Experts(
            "feed_forward",
            gate="w1",
            up="w3",
            down="w2",
            vector="expert_bias",
            blocks=lambda config: range(config["num_dense_layers"], config["num_hidden_layers"]),
        ),
        numbered=(),
        first_blocks=("num_dense_layers",),
        sizes=lambda config: {},
    ),
)
