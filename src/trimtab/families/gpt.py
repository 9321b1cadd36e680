"""Decoders of 2019 to 2023 with LayerNorm, most with query, key and value in one layer: BLOOM, MPT, Pythia and others.

GPT-2 is fetched as the GPTBigCode that it is: its layers, which it stores transposed, are then linear layers.

Most of them compute attention in their own modules, where no engine of PyTorch rounds or pages what they keep.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Mlp

_FUSED = "its keys and values come out of {}, with the queries"


def _gpt_sizes(config: Config) -> dict[str, Any]:
    """GPT-2's names of the sizes."""
    hidden, heads = config.get("n_embd"), config.get("n_head")
    return {
        "num_hidden_layers": config.get("n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": config.get("n_inner") or (hidden and 4 * hidden),
        "max_position_embeddings": config.get("n_positions"),
    }


def _bigcode_sizes(config: Config) -> dict[str, Any]:
    """One head of keys for all queries, unless the config says otherwise."""
    sizes = _gpt_sizes(config)
    return sizes | ({"num_key_value_heads": 1} if config.get("multi_query", True) else {})


def _bloom_sizes(config: Config) -> dict[str, Any]:
    """Early config.json say n_embed and num_attention_heads."""
    hidden = config.get("n_embed") or config.get("hidden_size")
    heads = config.get("n_head") or config.get("num_attention_heads")
    return {
        "num_hidden_layers": config.get("n_layer") or config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": hidden and 4 * hidden,
        # No position is learned; seq_length is what it was trained on.
        "max_position_embeddings": config.get("seq_length") or 2048,
    }


def _mpt_sizes(config: Config) -> dict[str, Any]:
    """MosaicML's names of the sizes; transformers builds 4 times as many neurons as channels, whatever it is told."""
    hidden, heads = config.get("d_model"), config.get("n_heads")
    return {
        "num_hidden_layers": config.get("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": hidden and 4 * hidden,
        "max_position_embeddings": config.get("max_seq_len"),
    }


def as_bigcode(config: Config) -> Config:
    """Returns GPT-2's config.json as that of the GPTBigCode with the same function; others as they are.

    Their blocks are alike; GPTBigCode has linear layers, and those of queries, keys and values head by head.
    """
    if config.get("model_type") != "gpt2" or config.get("architectures") != ["GPT2LMHeadModel"]:
        return config
    changes = {"model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "multi_query": False}
    return {"activation_function": "gelu_new", **config, **changes}


BLOOM = Family(
    "bloom",
    attention=Attention("self_attention", output="dense", qkv="query_key_value"),
    mlp=Mlp(gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    norm="w, b",
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    last_norm="transformer.ln_f",
    depth="n_layer",
    limits=(
        Limit("apply_residual_connection_post_layernorm", False, (False,), "and what its norms make is the residual"),
    ),
    sizes=_bloom_sizes,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    others=lambda config, sizes: {
        f"transformer.word_embeddings_layernorm.{part}": (sizes.hidden,) for part in ("weight", "bias")
    },
    pipeline_parallel=False,
    no_serve=_FUSED.format("query_key_value"),
)
MPT = Family(
    "mpt",
    attention=Attention("attn", "norm_1", output="out_proj", qkv="Wqkv"),
    mlp=Mlp("ffn", "norm_2", gate=None),
    blocks="transformer.blocks",
    embedding="transformer.wte",
    last_norm="transformer.norm_f",
    norms=("norm_1", "norm_2"),
    depth="n_layers",
    limits=(
        Limit("no_bias", True, (True,), "and transformers builds it without biases"),
        Limit("expansion_ratio", 4, (4,), "and transformers builds 4 times as many neurons as channels"),
        Limit("logit_scale", None, (None,), "and transformers leaves it out"),
    ),
    sizes=_mpt_sizes,
    qkv_bias=False,
    pipeline_parallel=False,
    no_serve=_FUSED.format("Wqkv"),
)
BIGCODE = Family(
    "gpt_bigcode",
    attention=Attention("attn", "ln_1", output="c_proj", qkv="c_attn"),
    mlp=Mlp(norm="ln_2", gate=None, up="c_fc", down="c_proj"),
    norm="w, b",
    blocks="transformer.h",
    embedding="transformer.wte",
    last_norm="transformer.ln_f",
    norms=("ln_1", "ln_2"),
    depth="n_layer",
    limits=(
        Limit("add_cross_attention", False, (False,), "and attention to an encoder is not known"),
        Limit("scale_attn_by_inverse_layer_idx", False, (False,), "and scores by the block are not known"),
    ),
    sizes=_bigcode_sizes,
    misread_heads=("vllm",),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    others=lambda config, sizes: {"transformer.wpe.weight": (config.get("n_positions", 1024), sizes.hidden)},
    no_serve=_FUSED.format("c_attn"),
)
#: Pythia among them. transformers calls the head lm_head, and checkpoints embed_out.
NEOX = Family(
    "gpt_neox",
    attention=Attention("attention", output="dense", qkv="query_key_value"),
    mlp=Mlp(gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    norm="w, b",
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    last_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    aliases=(("embed_out", "lm_head"),),
    sizes=lambda config: {"num_key_value_heads": config.get("num_attention_heads")},
    qkv_bias=("attention_bias", True),
    output_bias=("attention_bias", True),
    mlp_bias=True,
    no_serve=_FUSED.format("query_key_value"),
)
#: Attention and MLP read one norm.
GPTJ = Family(
    "gptj",
    attention=Attention("attn", None, output="out_proj", own_scores=True),
    mlp=Mlp(norm=None, gate=None, up="fc_in", down="fc_out"),
    norm="w, b",
    blocks="transformer.h",
    embedding="transformer.wte",
    last_norm="transformer.ln_f",
    norms=("ln_1",),
    depth="n_layer",
    sizes=_gpt_sizes,
    qkv_bias=False,
    mlp_bias=True,
    head_bias=True,
    pipeline_parallel=False,
    no_serve="its attention is computed in a module of its own, which reads no paged cache",
)
CODEGEN = replace(
    GPTJ,
    model_type="codegen",
    attention=Attention("attn", None, output="out_proj", qkv="qkv_proj"),
    no_serve=_FUSED.format("qkv_proj"),
)
PERSIMMON = Family(
    "persimmon",
    attention=Attention(
        output="dense",
        qkv="query_key_value",
        head_norms=("q_layernorm", "k_layernorm"),
        has_head_norms=("qk_layernorm", True),
    ),
    mlp=Mlp(gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    norm="w, b",
    last_norm="model.final_layernorm",
    sizes=lambda config: {"num_key_value_heads": config.get("num_attention_heads")},
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    no_serve=_FUSED.format("query_key_value"),
)
FAMILIES = (BLOOM, MPT, BIGCODE, NEOX, GPTJ, CODEGEN, PERSIMMON)
