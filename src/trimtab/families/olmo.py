"""OLMo and EXAONE 4: blocks without a norm that has a weight ahead of their layers; OLMoE, which has such norms."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family
from trimtab.families.parts import Attention, Config, Experts, Mlp

#: Since OLMo 2 the norms stand behind attention and MLP, and a norm spans all heads of queries, or of keys.
OLMO2 = Family(
    "olmo2",
    attention=Attention(norm=None, head_norms=("q_norm", "k_norm"), head_norms_span="heads"),
    mlp=Mlp(norm=None),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    output_bias=("attention_bias", False),
)


def _whole_context(config: Config) -> list[int]:
    """EXAONE 4 turns queries and keys by position in blocks with a window alone, if any block has one."""
    kinds = config.get("layer_types") or ()
    return [n for n, kind in enumerate(kinds) if kind == "full_attention"] if config.get("sliding_window") else []


FAMILIES = (
    OLMO2,
    replace(OLMO2, model_type="olmo3"),
    replace(
        OLMO2,
        model_type="exaone4",
        attention=replace(OLMO2.attention, head_norms_span="head"),
        nope=_whole_context,
        qkv_bias=False,
        output_bias=False,
        tensor_parallel=True,
    ),
    Family(
        "olmoe",
        attention=Attention(head_norms=("q_norm", "k_norm"), head_norms_span="heads", clips=True),
        mlp=None,
        experts=Experts(size="intermediate_size"),
        output_bias=("attention_bias", False),
    ),
    replace(OLMO2, model_type="flex_olmo", mlp=None, experts=Experts(size="intermediate_size")),
    # Norms without weights, which checkpoints do not hold.
    Family(
        "olmo",
        attention=Attention(norm=None, clips=True),
        mlp=Mlp(norm=None),
        norm="none",
        norms=(),
        output_bias=("attention_bias", False),
        tensor_parallel=True,
    ),
)
