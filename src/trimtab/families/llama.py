"""Llama, and what is Llama under another name: RMSNorm, attention, RMSNorm, and an MLP of act(gate) * up.

Llama 4 has experts, and blocks that look at a part of the context or have no rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimtab.families.family import Family, Logits
from trimtab.families.parts import Attention, Config, Experts, Mlp, Shape

LLAMA = Family(
    "llama",
    output_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    llama_block=True,
    width=True,
    heads_divide_hidden=True,
    tensor_parallel=True,
)
#: What has a Llama's layers, and computes a Llama's blocks or something like them.
_LIKE = replace(LLAMA, heads_divide_hidden=False, width=False)
_OTHER = replace(_LIKE, llama_block=False)
_WITHOUT_BIAS = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}


def _without_rotary(config: Config) -> list[int]:
    """SmolLM3 lists a 0 for a block without rotary embeddings; without the list, one in each interval is one."""
    interval = config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [(n + 1) % interval for n in range(config["num_hidden_layers"])]
    return [block for block, turns in enumerate(turned) if not turns]


def _xielu() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
    return {f"model.layers.{{}}.mlp.act_fn.{name}": shape for name, shape in shapes.items()}


def _hyperclovax_norms(config: Config) -> tuple[str, ...]:
    behind = ("post_norm1", "post_norm2") if config.get("use_post_norm", True) else ()
    return ("input_layernorm", "post_attention_layernorm", *behind)


def _interleaved(config: Config) -> Sequence[int]:
    """Llama 4 has experts in one block of each interval, unless it lists which."""
    interval = config.get("interleave_moe_layer_step", 1)
    return config.get("moe_layers") or range(interval - 1, config["num_hidden_layers"], interval)


FAMILIES = (
    LLAMA,
    replace(LLAMA, model_type="mistral", heads_divide_hidden=False, **_WITHOUT_BIAS),
    replace(_LIKE, model_type="ministral", **_WITHOUT_BIAS),
    replace(
        _LIKE,
        model_type="seed_oss",
        head_dim=128,
        qkv_bias=("attention_bias", True),
        output_bias=("attention_out_bias", False),
    ),
    replace(_LIKE, model_type="cwm", head_dim=128, qkv_bias=False, output_bias=False),
    replace(_LIKE, model_type="smollm3", by_layer=("layer_types", "no_rope_layers"), nope=_without_rotary),
    # Rotary embeddings that turn neighbouring numbers of a head, where Llama turns its halves.
    replace(
        _OTHER,
        model_type="ernie4_5",
        head_dim=128,
        qkv_bias=("use_bias", False),
        output_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
    ),
    replace(_OTHER, model_type="helium", head_dim=128, output_bias=False),
    # relu(up)² has no gate.
    replace(_OTHER, model_type="arcee", mlp=Mlp(gate=None)),
    # What embeddings, attention and residuals are multiplied by is in the model; what the logits are divided by is not.
    replace(
        _OTHER,
        model_type="granite",
        logits=lambda config: Logits(scale=1 / (config.get("logits_scaling") or 1.0)),
    ),
    # Granite's multipliers, but the logits are multiplied too; it may have norms behind its parts.
    replace(
        _OTHER,
        model_type="hyperclovax",
        norms=_hyperclovax_norms,
        logits=lambda config: Logits(scale=config.get("logits_scaling") or 1.0),
    ),
    # Neurons without a gate; their activation, xIELU, has parameters of its own.
    replace(
        _OTHER,
        model_type="apertus",
        attention=Attention(norm="attention_layernorm", head_norms=("q_norm", "k_norm")),
        mlp=Mlp(norm="feedforward_layernorm", gate=None),
        norms=("attention_layernorm", "feedforward_layernorm"),
        mlp_bias=False,
        others=lambda config, sizes: _xielu() if config.get("hidden_act", "xielu") == "xielu" else {},
    ),
    # Queries are multiplied by a number that their position gives, which the decoding step does not know.
    replace(_OTHER, model_type="ministral3", head_dim=128, **_WITHOUT_BIAS),
    # Norms without weights; those of a head stand behind the rotary embedding.
    replace(
        _OTHER,
        model_type="nanochat",
        attention=Attention(norm=None),
        mlp=Mlp(norm=None, gate=None, up="fc1", down="fc2"),
        norm="none",
        norms=(),
        logits=lambda config: Logits(cap=config.get("final_logit_softcapping", 15.0)),
        mlp_bias=False,
    ),
    replace(
        _OTHER,
        model_type="hunyuan_v1_dense",
        attention=Attention(head_norms=("query_layernorm", "key_layernorm")),
        mlp_bias=False,
        tensor_parallel=False,
    ),
    # `fetch` puts the experts, which are stored as one tensor, apart: a layer each.
    Family(
        "llama4_text",
        mlp=Mlp("feed_forward", size="intermediate_size_mlp"),
        experts=Experts(
            "feed_forward",
            shared="shared_expert",
            plain=("router",),
            blocks=_interleaved,
            size="intermediate_size",
            shared_size="intermediate_size",
        ),
        head_dim=128,
        output_bias=("attention_bias", False),
        by_layer=("layer_types", "no_rope_layers"),
        numbered=("moe_layers",),
        attention_types=("full_attention", "chunked_attention"),
        nope=_without_rotary,
        no_serve="its blocks look at a part of the context that the engine's cache does not know",
    ),
)
