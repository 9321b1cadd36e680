"""The config.json of a TensorRT-LLM checkpoint, from that of a Hugging Face Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.recipe import Engine


def config(settings: Mapping[str, Any], quantization: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """Returns the config of all ranks together.

    Args:
        settings: the model's config.json; transformers before and after 5 write the rotary embedding differently.
        quantization: TensorRT-LLM's `quantization`.
        engine: says the parallelism, which an engine cannot change later.
    """
    heads = settings["num_attention_heads"]
    return {
        "architecture": settings["architectures"][0],
        "dtype": settings.get("dtype") or settings.get("torch_dtype") or "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": settings["vocab_size"],
        "max_position_embeddings": settings["max_position_embeddings"],
        "hidden_size": settings["hidden_size"],
        "num_hidden_layers": settings["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_key_value_heads") or heads,
        "head_size": settings.get("head_dim") or settings["hidden_size"] // heads,
        "hidden_act": settings.get("hidden_act", "silu"),
        "intermediate_size": settings["intermediate_size"],
        "norm_epsilon": settings.get("rms_norm_eps", 1e-6),
        "attn_bias": bool(settings.get("attention_bias")),
        "mlp_bias": bool(settings.get("mlp_bias")),
        "position_embedding_type": "rope_gpt_neox",
        **_rotary(settings),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": engine.world_size,
            "tp_size": engine.tensor_parallel_size,
            "pp_size": engine.pipeline_parallel_size,
        },
        "quantization": dict(quantization),
    }


def _rotary(settings: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    found = {"rotary_base": float(scaling.pop("rope_theta", settings.get("rope_theta", 10000.0)))}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        found["rotary_scaling"] = {**scaling, "rope_type": kind, "type": kind}
    return found
