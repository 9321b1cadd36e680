"""A tiny random model of every family that trimtab describes, built by transformers from its own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

LAYERS, HIDDEN, NEURONS, HEADS, KV_HEADS, WINDOW = 4, 64, 128, 4, 2, 16
#: Families that always have four times as many neurons as channels.
WIDE = ("bloom", "mpt")
_SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
_HEAD = {"head_dim": HIDDEN // HEADS}
#: What a family's config is given beside the sizes: windows that a short text fills, multipliers and caps that matter.
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "ministral": {**_HEAD, "sliding_window": WINDOW},
    "seed_oss": _HEAD,
    "cwm": {**_HEAD, "sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "ernie4_5": _HEAD,
    "helium": _HEAD,
    "granite": {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 8.0},
    "hyperclovax": {**_HEAD, "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                    "logits_scaling": 0.125},
    "apertus": _HEAD,
    "ministral3": {**_HEAD, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0,
                                                "original_max_position_embeddings": 16, "beta_fast": 32.0,
                                                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                                                "llama_4_scaling_beta": 0.5}},
    "nanochat": {"final_logit_softcapping": 2.0},
    "hunyuan_v1_dense": {**_HEAD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": _HEAD,
    "gemma": _HEAD,
    "gemma2": {**_HEAD, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "final_logit_softcapping": 2.0,
               "attn_logit_softcapping": 0.5},
    "vaultgemma": {**_HEAD, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "final_logit_softcapping": 2.0,
                   "attn_logit_softcapping": 0.5},
    "gemma3_text": {**_HEAD, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
    "glm": _HEAD,
    "glm4": _HEAD,
    "olmo3": {"sliding_window": WINDOW},
    "exaone4": {"sliding_window": WINDOW},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW},
    "phi": {"qk_layernorm": True},
    "jais2": _HEAD,
    "nemotron": _HEAD,
    "gptj": {"n_inner": NEURONS, "rotary_dim": 8},
    "codegen": {"n_inner": NEURONS, "rotary_dim": 8},
    "gpt_bigcode": {"n_inner": NEURONS},
    "mpt": {"max_seq_len": 256},
    "opt": {"ffn_dim": NEURONS, "word_embed_proj_dim": HIDDEN},
    "falcon": {"ffn_hidden_size": NEURONS},
}  # fmt: skip


def config(model_type: str, **changes: Any) -> Any:
    """Returns transformers' config of a tiny model."""
    from transformers import AutoConfig

    tokens = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoConfig.for_model(model_type, **{**_SIZES, **tokens, **_OWN.get(model_type, {}), **changes})


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Returns a model in float32 whose norms and biases are not what they are made as: 1 and 0."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """Writes such a model in bfloat16, with a tokenizer."""
    import torch

    build(model_type, **changes).to(torch.bfloat16).save_pretrained(folder)
    tiny._tokenizer().save_pretrained(folder)
    return folder
