"""A tiny random model of every wrapper that trimtab describes, built by transformers: its text model, and a tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoders

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_VISION = {"hidden_size": 32, "out_hidden_size": decoders.HIDDEN, "intermediate_size": 48, "depth": 1,
                "num_heads": 2, "patch_size": 14}  # fmt: skip
_DEEPSTACK = {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}


def _sections(*sizes: int, **settings: Any) -> dict[str, Any]:
    """A share of the eight angles of a head for time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sizes], **settings}}


#: Of each wrapper the settings of its text model, of its tower, and its own.
_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16,
                "sliding_window": decoders.WINDOW}, _VISION, {"mm_tokens_per_image": 4}),
    "mistral3": ({"model_type": "mistral", "sliding_window": decoders.WINDOW}, {**_VISION, "head_dim": 16},
                 {"tie_word_embeddings": False}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_VISION}, {}),
    "qwen2_5_vl": ({"use_sliding_window": True, "sliding_window": decoders.WINDOW, "max_window_layers": 2,
                    **_sections(2, 3, 3)}, {**_QWEN_VISION, "fullatt_block_indexes": [0]}, {}),
    "qwen3_vl": ({"head_dim": 16, **_sections(3, 3, 2, mrope_interleaved=True)}, _DEEPSTACK, {}),
    "qwen3_vl_moe": ({"head_dim": 16, "num_experts": decoders.EXPERTS, "num_experts_per_tok": 2,
                      "moe_intermediate_size": decoders.EXPERT, "mlp_only_layers": [1],
                      **_sections(3, 3, 2, mrope_interleaved=True)}, _DEEPSTACK, {}),
    "qwen3_5": ({"head_dim": 16, **decoders._DELTA, **_sections(1, 1, 0, partial_rotary_factor=0.25)},
                {**_QWEN_VISION, "num_position_embeddings": 16}, {}),
    "qwen3_5_moe": ({"head_dim": 16, **decoders._DELTA, "num_experts": decoders.EXPERTS, "num_experts_per_tok": 2,
                     "moe_intermediate_size": decoders.EXPERT, "shared_expert_intermediate_size": 96,
                     **_sections(1, 1, 0, partial_rotary_factor=0.25)},
                    {**_QWEN_VISION, "num_position_embeddings": 16}, {}),
    "llama4": ({"head_dim": 16, "num_local_experts": decoders.EXPERTS, "num_experts_per_tok": 1,
                "intermediate_size_mlp": decoders.NEURONS, "moe_layers": [0, 2], "no_rope_layers": [1, 0, 1, 1],
                "attention_chunk_size": decoders.WINDOW, "intermediate_size": 64},
               {**_VISION, "intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32,
                "projector_output_dim": 32}, {}),
}  # fmt: skip
MINISTRAL3 = {"model_type": "ministral3", "head_dim": 16, "sliding_window": None, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5}}  # fmt: skip


def config(model_type: str, text: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Returns transformers' config of a tiny wrapper; `text` changes the settings of its text model."""
    from transformers import AutoConfig

    own, vision, whole = _PARTS[model_type]
    tokens = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    settings = {**decoders._SIZES, **tokens, **own, **(text or {})}
    return AutoConfig.for_model(model_type, text_config=settings, vision_config=dict(vision), **{**whole, **changes})


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Returns a wrapper in float32 whose norms and biases are not what they are made as: 1 and 0."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    return decoders.perturbed(AutoModelForImageTextToText.from_config(config(model_type, **changes)).eval())


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """Writes such a model in bfloat16, with a tokenizer and a file of its image processor."""
    decoders.save(build(model_type, **changes), folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return folder
