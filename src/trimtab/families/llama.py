"""Llama, and what is Llama under another name: RMSNorm, attention, RMSNorm, and an MLP of act(gate) * up.

Llama 4 has experts, and blocks that look at a part of the context or have no rotary embeddings.
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Config, Experts, Mlp

LLAMA = Family("llama", llama_block=True, width=True, heads_divide_hidden=True, tensor_parallel=True)


def _without_rotary(config: Config) -> list[int]:
    """SmolLM3 lists a 0 for a block without rotary embeddings; without the list, one in each interval is one."""
    interval = config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [(n + 1) % interval for n in range(config["num_hidden_layers"])]
    return [block for block, turns in enumerate(turned) if not turns]


FAMILIES = (
    LLAMA,
    replace(LLAMA, model_type="mistral", qkv_bias=False, heads_divide_hidden=False),
    replace(LLAMA, model_type="ministral", qkv_bias=False, heads_divide_hidden=False, width=False),
    replace(LLAMA, model_type="seed_oss", heads_divide_hidden=False, width=False),
    replace(LLAMA, model_type="cwm", heads_divide_hidden=False, width=False),
    replace(
        LLAMA,
        model_type="smollm3",
        by_layer=("layer_types", "no_rope_layers"),
        nope=_without_rotary,
        heads_divide_hidden=False,
        width=False,
    ),
    # Rotary embeddings that turn neighbouring numbers of a head, where Llama turns its halves.
    replace(LLAMA, model_type="ernie4_5", heads_divide_hidden=False, llama_block=False, width=False),
    replace(LLAMA, model_type="helium", heads_divide_hidden=False, llama_block=False, width=False),
    # relu(up)² has no gate.
    replace(
        LLAMA, model_type="arcee", mlp=Mlp(gate=None), heads_divide_hidden=False, llama_block=False, width=False
    ),
    # What embeddings, attention and residuals are multiplied by is in the model; what the logits are divided by is not.
    replace(
        LLAMA,
        model_type="granite",
        limits=(
            Limit("logits_scaling", 1.0, (1, None), "and the engine scores with what the output head gives alone"),
        ),
        heads_divide_hidden=False,
        llama_block=False,
        width=False,
    ),
    replace(
        LLAMA,
        model_type="hunyuan_v1_dense",
        attention=Attention(head_norms=("query_layernorm", "key_layernorm")),
        heads_divide_hidden=False,
        llama_block=False,
        width=False,
        tensor_parallel=False,
    ),
    # `fetch` puts the experts, which are stored as one tensor, apart: a layer each.
    Family(
        "llama4_text",
        mlp=Mlp("feed_forward"),
        experts=Experts(
            "feed_forward", shared="shared_expert", plain=("router",),
            size="intermediate_size", shared_size="intermediate_size",
        ),
        by_layer=("layer_types", "no_rope_layers"),
        numbered=("moe_layers",),
        attention_types=("full_attention", "chunked_attention"),
        nope=_without_rotary,
        no_serve="its blocks look at a part of the context that the engine's cache does not know",
    ),
)
