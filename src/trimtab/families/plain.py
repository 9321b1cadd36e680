"""Decoders with LayerNorm, most with an MLP without a gate: Falcon, OPT, StableLM, StarCoder2, Jais 2, Nemotron."""

from __future__ import annotations

from typing import Any

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Mlp, Shape


def _falcon_sizes(config: Config) -> dict[str, Any]:
    """One head of keys for all queries, unless the config is of the later build, which counts them."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    counted = config.get("new_decoder_architecture") or not config.get("multi_query", True)
    kv_heads = (config.get("num_kv_heads") or heads) if counted else 1
    neurons = config.get("ffn_hidden_size") or (hidden and 4 * hidden)
    return {"num_key_value_heads": kv_heads, "intermediate_size": neurons}


def _falcon_norms(config: Config) -> tuple[str, ...]:
    """One norm for both parts, or one for each: beside each other, or one behind the other."""
    if config.get("new_decoder_architecture"):
        both = config.get("num_ln_in_parallel_attn") in (None, 2)
        return ("ln_attn", "ln_mlp") if both else ("input_layernorm",)
    parallel = config.get("parallel_attn", True)
    return ("input_layernorm",) if parallel else ("input_layernorm", "post_attention_layernorm")


def _opt_others(config: Config, sizes: Any) -> dict[str, Shape | None]:
    """Learned positions, the first two for padding, and embeddings of another width than the hidden size."""
    found: dict[str, Shape | None] = {
        "model.decoder.embed_positions.weight": (config.get("max_position_embeddings", 2048) + 2, sizes.hidden)
    }
    width = config.get("word_embed_proj_dim") or sizes.hidden
    if width != sizes.hidden:
        found["model.decoder.project_in.weight"] = (sizes.hidden, width)
        found["model.decoder.project_out.weight"] = (width, sizes.hidden)
        found["model.decoder.embed_tokens.weight"] = (config["vocab_size"], width)
    if config.get("_remove_final_layer_norm"):
        found |= {f"model.decoder.final_layer_norm.{part}": None for part in ("weight", "bias")}
    return found


def _stablelm_norms(config: Config) -> tuple[str, ...]:
    one = config.get("use_parallel_residual")
    return ("input_layernorm",) if one else ("input_layernorm", "post_attention_layernorm")


def _stablelm_others(config: Config, sizes: Any) -> dict[str, Shape]:
    """A norm for each head, by its number."""
    if not config.get("qk_layernorm"):
        return {}
    counts = {"q_layernorm": sizes.heads, "k_layernorm": sizes.kv_heads}
    names = [f"{norm}.norms.{head}" for norm, heads in counts.items() for head in range(heads)]
    return {f"model.layers.{{}}.self_attn.{name}.weight": (sizes.head_dim,) for name in names}


FALCON = Family(
    "falcon",
    attention=Attention("self_attention", None, output="dense", qkv="query_key_value"),
    mlp=Mlp(norm=None, gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    norm="w, b",
    blocks="transformer.h",
    embedding="transformer.word_embeddings",
    last_norm="transformer.ln_f",
    limits=(Limit("alibi", False, (False,), "and biases of attention by distance (ALiBi) are not known"),),
    norms=_falcon_norms,
    sizes=_falcon_sizes,
    qkv_bias=("bias", False),
    output_bias=("bias", False),
    mlp_bias=("bias", False),
    pipeline_parallel=False,
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
    limits=(Limit("do_layer_norm_before", True, (True,), "and norms behind its parts are not known"),),
    sizes=lambda config: {
        "intermediate_size": config.get("ffn_dim"),
        "num_key_value_heads": config.get("num_attention_heads"),
    },
    norms=("self_attn_layer_norm", "final_layer_norm"),
    bos=True,
    qkv_bias=("enable_bias", True),
    output_bias=("enable_bias", True),
    mlp_bias=("enable_bias", True),
    others=_opt_others,
)
STABLELM = Family(
    "stablelm",
    # With use_parallel_residual attention and MLP read one norm.
    attention=Attention(norm=None),
    mlp=Mlp(norm=None),
    norm="w, b",
    norms=_stablelm_norms,
    qkv_bias=("use_qkv_bias", False),
    others=_stablelm_others,
    no_serve="its blocks do not hand the engine's cache on to attention",
)
STARCODER2 = Family(
    "starcoder2",
    mlp=Mlp(gate=None, up="c_fc", down="c_proj"),
    norm="w, b",
    qkv_bias=("use_bias", True),
    output_bias=("use_bias", True),
    mlp_bias=("use_bias", True),
)
JAIS2 = Family(
    "jais2",
    mlp=Mlp(gate=None),
    norm="w, b",
    qkv_bias=("attention_bias", True),
    output_bias=("attention_bias", True),
    mlp_bias=("mlp_bias", True),
    tensor_parallel=True,
)
NEMOTRON = Family(
    "nemotron",
    mlp=Mlp(gate=None),
    norm="1 + w, b",
    output_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    no_serve="its blocks do not hand the engine's cache on to attention",
)
FAMILIES = (FALCON, OPT, STABLELM, STARCODER2, JAIS2, NEMOTRON)
