"""Qwen3-Next and Qwen3.5: three blocks with a gated delta net for each one with attention, whose output is gated.

Qwen's own checkpoints in FP8 round the large projections of a delta net, and leave those that choose what it forgets
and adds as they are; the blocks of `mtp.…`, which predict further tokens, they leave as they are too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts, Shape
from trimtab.families.recurrent import Recurrent, State, listed


class _Sizes(NamedTuple):
    """A gated delta net by its config: channels of its keys and of its values, heads of values, the size of a head of
    keys and of one of values, and the inputs that its convolution sees."""

    keys: int
    values: int
    heads: int
    key: int
    value: int
    kernel: int

    @property
    def channels(self) -> int:
        """What the convolution goes over: queries, keys and values."""
        return 2 * self.keys + self.values


def _sizes(config: Config) -> _Sizes:
    key_heads, key = config.get("linear_num_key_heads", 16), config.get("linear_key_head_dim", 128)
    heads, value = config.get("linear_num_value_heads", 32), config.get("linear_value_head_dim", 128)
    kernel = config.get("linear_conv_kernel_dim", 4)
    return _Sizes(key_heads * key, heads * value, heads, key, value, kernel)


def _state(config: Config) -> State:
    """Yang et al. 2024, "Gated Delta Networks": a matrix for each head of values."""
    sizes = _sizes(config)
    return State(sizes.channels * sizes.kernel, sizes.heads * sizes.key * sizes.value)


def _shapes(config: Config, joined: bool) -> dict[str, Shape]:
    """`joined`: Qwen3-Next makes of a block's input in two layers what Qwen3.5 makes in four."""
    sizes, hidden = _sizes(config), config["hidden_size"]
    if joined:
        outputs = {"in_proj_qkvz": sizes.channels + sizes.values, "in_proj_ba": 2 * sizes.heads}
    else:
        outputs = {"in_proj_qkv": sizes.channels, "in_proj_z": sizes.values, "in_proj_b": sizes.heads,
                   "in_proj_a": sizes.heads}  # fmt: skip
    return {
        **{f"{name}.weight": (size, hidden) for name, size in outputs.items()},
        "conv1d.weight": (sizes.channels, 1, sizes.kernel),
        "A_log": (sizes.heads,),
        "dt_bias": (sizes.heads,),
        "norm.weight": (sizes.value,),
        "out_proj.weight": (hidden, sizes.values),
    }


def _delta_nets(config: Config) -> list[int]:
    """All blocks but the last of each interval, unless a list says which."""
    interval = config.get("full_attention_interval", 4)
    found = listed(config)
    return [n for n in range(config["num_hidden_layers"]) if (n + 1) % interval] if found is None else found


#: As of Qwen3 MoE: a step above 1 would take experts from blocks by their place.
_STEP = Limit("decoder_sparse_step", 1, (1,), "and only blocks that mlp_only_layers names may have no experts")
_EXPERTS = Experts(
    shared="shared_expert",
    plain=("gate", "shared_expert_gate"),
    shared_size="shared_expert_intermediate_size",
    blocks=lambda config: [
        n for n in range(config["num_hidden_layers"]) if n not in (config.get("mlp_only_layers") or ())
    ],
)
QWEN3_NEXT = Family(
    "qwen3_next",
    attention=Attention(head_norms=("q_norm", "k_norm"), gated=True),
    experts=_EXPERTS,
    recurrent=Recurrent(
        "linear_attn",
        _state,
        lambda config: _shapes(config, joined=True),
        projections=("in_proj_qkvz", "in_proj_ba"),
        blocks=_delta_nets,
    ),
    norm="1 + w",
    limits=(_STEP,),
    keep=("linear_attn.in_proj_ba",),
    numbered=("mlp_only_layers",),
    beside=("mtp.",),
    attention_types=("full_attention", "linear_attention"),
    head_dim=256,
    pipeline_parallel=False,
    no_serve="the engine's cache holds no recurrent state",
)
QWEN3_5 = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    experts=None,
    recurrent=replace(
        QWEN3_NEXT.recurrent,
        shapes=lambda config: _shapes(config, joined=False),
        projections=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ),
    limits=(),
    keep=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    numbered=(),
)
FAMILIES = (
    QWEN3_NEXT,
    QWEN3_5,
    replace(QWEN3_5, model_type="qwen3_5_moe_text", mlp=None, experts=_EXPERTS),
)
