"""A tiny random model of every family that trimtab describes, built by transformers from its own classes."""

from __future__ import annotations

import re
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
EXPERTS, EXPERT = 4, 32
_MOE = {"moe_intermediate_size": EXPERT, "num_experts_per_tok": 2}
_GROUPED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"num_key_value_heads": HEADS, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
          "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_MULTIPLIED = {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
               "logits_scaling": 4.0}  # fmt: skip
#: Families that hold experts' weights as [experts, in, out].
_FROM_THE_LEFT = ("gpt_oss", "llama4_text")
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
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": {**_HEAD, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "rotary_dim": 8},
    "qwen2_moe": {**_MOE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 96, "mlp_only_layers": [1]},
    "qwen3_moe": {**_MOE, **_HEAD, "num_experts": EXPERTS, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "glm4_moe": {**_MOE, **_HEAD, **_GROUPED, "use_qk_norm": True, "first_k_dense_replace": 1,
                 "num_nextn_predict_layers": 0},
    "dots1": {**_MOE, **_HEAD, **_GROUPED, "first_k_dense_replace": 1, "sliding_window": WINDOW,
              "max_window_layers": 2},
    "deepseek_v2": {**_MOE, **_GROUPED, **_LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**_MOE, **_GROUPED, **_LATENT, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "gpt_oss": {**_HEAD, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "llama4_text": {**_HEAD, "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": NEURONS,
                    "moe_layers": [0, 2], "no_rope_layers": [1, 0, 1, 1], "attention_chunk_size": WINDOW,
                    "intermediate_size": 64},
    "qwen3_next": {**_MOE, **_HEAD, **_DELTA, "num_experts": EXPERTS, "shared_expert_intermediate_size": 96,
                   "mlp_only_layers": [1]},
    "qwen3_5_text": {**_HEAD, **_DELTA},
    "qwen3_5_moe_text": {**_MOE, **_HEAD, **_DELTA, "num_experts": EXPERTS, "shared_expert_intermediate_size": 96},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_MOE, "layer_types": ["conv", "full_attention", "full_attention", "conv"], "num_experts": EXPERTS,
                 "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    # As long as a text: transformers sums wrongly over several chunks.
    "nemotron_h": {**_MOE, **_HEAD, "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
                   "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 128,
                   "n_routed_experts": EXPERTS, "moe_shared_expert_intermediate_size": 96},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 2]},
    "ernie4_5_moe": {"moe_intermediate_size": EXPERT, "moe_k": 2, "moe_num_experts": EXPERTS,
                     "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "hunyuan_v1_moe": {**_HEAD, "num_experts": EXPERTS, "moe_topk": [2] * LAYERS,
                       "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, **_MULTIPLIED},
    "granitemoeshared": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": EXPERT,
                         "shared_intermediate_size": NEURONS, **_MULTIPLIED},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention", "full_attention",
                                                   "linear_attention"],
                         "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": EXPERT,
                         "shared_intermediate_size": NEURONS, **_MULTIPLIED},
    "jamba": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
              "attn_layer_period": 4, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    # Its multipliers of a state become a tensor, rounded to the model's type.
    "falcon_h1": {**_MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_rms_norm": True, "lm_head_multiplier": 2.0,
                  "embedding_multiplier": 3.0, "mlp_multipliers": [0.8, 0.6], "key_multiplier": 0.9,
                  "attention_in_multiplier": 0.5, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.5,
                  "ssm_out_multiplier": 0.4, "ssm_multipliers": [0.875, 0.75, 0.625, 1.125, 1.25]},
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
    made = config(model_type, **changes)
    # PyTorch's attention would leave a cap of its scores out.
    how = "eager" if getattr(made, "attn_logit_softcapping", None) else None
    return perturbed(AutoModelForCausalLM.from_config(made, attn_implementation=how).eval())


def perturbed(model: Any) -> Any:
    """Returns a model with other norms and biases than it was made with."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def stored(model: Any) -> dict[str, Any]:
    """Returns the tensors of a model as its checkpoint has them: each expert's layers apart, under its names."""
    from trimtab import families

    family = families.named(model.config.model_type)
    text = model.config.get_text_config().model_type
    found = {}
    for name, tensor in model.state_dict().items():
        for own, theirs in sorted(family.aliases, key=lambda pair: -len(pair[1])):
            name = re.sub("^" + re.escape(theirs).replace(r"\*", r"(\d+)"), own.replace("*", r"\1"), name)
        found |= _apart(name, tensor, family.experts, text)
    if model.config.tie_word_embeddings:
        found.pop(f"{family.head}.weight", None)
    return found


def _apart(name: str, tensor: Any, part: Any, model_type: str) -> dict[str, Any]:
    """The layers of each expert out of one tensor for all, however transformers lays that out."""
    place, _, kind = name.rpartition(".experts.")
    if part is None or not place or kind.removesuffix("_bias") not in ("gate_up_proj", "up_proj", "down_proj"):
        return {name: tensor}
    what = "bias" if kind.endswith("_bias") else "weight"
    found = {}
    for number, one in enumerate(tensor):
        one = one.t() if what == "weight" and model_type in _FROM_THE_LEFT else one
        if kind.startswith("down"):
            parts = {part.down: one}
        elif part.gate is None:
            parts = {part.up: one}
        elif model_type == "gpt_oss":  # gate and up in turn
            parts = {part.gate: one[::2], part.up: one[1::2]}
        else:
            parts = dict(zip((part.gate, part.up), one.chunk(2), strict=True))
        found |= {f"{place}.experts.{number}.{layer}.{what}": value.contiguous() for layer, value in parts.items()}
    return found


def as_written(model_type: str, **changes: Any) -> Any:
    """Returns transformers' model of what `write` writes, in float32, also where transformers does not read that."""
    import torch

    model = build(model_type, **changes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """Writes such a model in bfloat16, with a tokenizer."""
    return save(build(model_type, **changes), folder)


def save(model: Any, folder: Path) -> Path:
    """Writes a model in bfloat16 as its checkpoint has it, with a tokenizer."""
    import torch
    from safetensors.torch import save_file

    model = model.to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in stored(model).items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    tiny._tokenizer().save_pretrained(folder)
    return folder
