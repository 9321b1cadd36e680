"""Decoders with LayerNorm, most with an MLP without a gate: Falcon, OPT, StableLM, StarCoder2."""

from __future__ import annotations

from typing import Any

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Mlp


def _falcon_sizes(config: Config) -> dict[str, Any]:
    """One head of keys for all queries, unless the config is of the later build, which counts them."""
    heads = config.get("num_attention_heads")
    counted = config.get("new_decoder_architecture") or not config.get("multi_query", True)
    kv_heads = (config.get("num_kv_heads") or heads) if counted else 1
    return {"num_key_value_heads": kv_heads, "intermediate_size": config.get("ffn_hidden_size")}


FALCON = Family(
    "falcon",
    attention=Attention("self_attention", None, output="dense", qkv="query_key_value"),
    mlp=Mlp(norm=None, gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    norm="w, b",
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    last_norm="transformer.ln_f",
    limits=(Limit("alibi", False, (False,), "and biases of attention by distance (ALiBi) are not known"),),
    sizes=_falcon_sizes,
    qkv_bias="bias",
    no_serve="its keys and values come out of query_key_value, with the queries",
)
OPT = Family(
    "opt",
    attention=Attention(norm="self_attn_layer_norm", output="out_proj"),
    mlp=Mlp(module="", norm="final_layer_norm", gate=None, up="fc1", down="fc2"),
    norm="w, b",
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    last_norm="model.decoder.final_layer_norm",
    sizes=lambda config: {
        "intermediate_size": config.get("ffn_dim"),
        "num_key_value_heads": config.get("num_attention_heads"),
    },
    bos=True,
    qkv_bias="enable_bias",
)
STABLELM = Family(
    "stablelm",
    norm="w, b",
    qkv_bias="use_qkv_bias",
    no_serve="its blocks do not hand the engine's cache on to attention",
)
STARCODER2 = Family(
    "starcoder2", mlp=Mlp(gate=None, up="c_fc", down="c_proj"), norm="w, b", qkv_bias="use_bias"
)
FAMILIES = (FALCON, OPT, STABLELM, STARCODER2)
