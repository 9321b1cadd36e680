"""What vLLM makes of compressed-tensors' `pack-quantized` files, with float32 products instead of its kernels."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

METHODS = ("compressed-tensors", "trimtab-int4")


def read(folder: Path, settings: dict[str, Any]) -> nn.Module:
    """Returns the model of a folder whose `quantization_config` are the settings."""
    if settings["quant_method"] == "trimtab-int4" and not importlib.metadata.entry_points(
        group="vllm.general_plugins", name="trimtab"
    ):
        raise ValueError("Invalid quantization method: trimtab-int4")
    (group,) = settings["config_groups"].values()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in settings["ignore"]:
            _unpack(name, layer, tensors, group["weights"]["group_size"])
            if name in settings.get("input_scaled_layers", ()):
                scale = tensors.pop(f"{name}.pre_quant_scale").float()
                layer.register_forward_pre_hook(lambda _, given, scale=scale: (given[0] * scale,))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"There is no module or parameter named {unexpected}, and none was loaded for {missing}")
    model.tie_weights()
    return model.eval()


def _unpack(name: str, layer: nn.Linear, tensors: dict[str, torch.Tensor], group_size: int) -> None:
    packed, scale = (tensors.pop(f"{name}.{part}") for part in ("weight_packed", "weight_scale"))
    shape = tensors.pop(f"{name}.weight_shape").tolist()
    if shape != list(layer.weight.shape) or scale.shape != (shape[0], shape[1] // group_size):
        raise AssertionError(f"{name}: param_data.shape == loaded_weight.shape")
    words = torch.stack([(packed >> 4 * place) & 15 for place in range(8)], dim=-1)
    numbers = words.reshape(shape[0], -1, group_size) - 8
    tensors[f"{name}.weight"] = (numbers * scale.float()[..., None]).reshape(shape)
