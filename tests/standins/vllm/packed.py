"""What vLLM makes of compressed-tensors' files, with float32 products and 16 bits for the KV cache."""

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
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in settings["ignore"]:
            (group,) = (g for g in settings["config_groups"].values() if {name, "Linear"} & {*g["targets"]})
            if group["format"] == "float-quantized":
                _scale(name, layer, tensors, group["weights"]["strategy"])
            elif group["format"] == "pack-quantized":
                _unpack(name, layer, tensors, group["weights"]["group_size"])
            else:
                _unpack_fp4(name, layer, tensors, group)
            if name in settings.get("input_scaled_layers", ()):
                scale = tensors.pop(f"{name}.pre_quant_scale").float()
                layer.register_forward_pre_hook(lambda _, given, scale=scale: (given[0] * scale,))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".k_scale", ".v_scale"))}
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


def _unpack_fp4(name: str, layer: nn.Linear, tensors: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    if group["input_activations"]:
        raise ValueError("No CUDA kernel for NVFP4 activations")
    packed, scale = (tensors.pop(f"{name}.{part}") for part in ("weight_packed", "weight_scale"))
    rows, columns = layer.weight.shape
    size = group["weights"]["group_size"]
    if packed.shape != (rows, columns // 2) or scale.shape != (rows, columns // size):
        raise AssertionError(f"{name}: param_data.shape == loaded_weight.shape")
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    numbers = torch.cat([positive, -positive])[codes.int()]
    if group["format"] == "mxfp4-pack-quantized":
        scale = torch.exp2(scale.float() - 127)
    else:
        scale = scale.float() / tensors.pop(f"{name}.weight_global_scale")
    tensors[f"{name}.weight"] = (numbers.view(rows, -1, size) * scale[..., None]).view(rows, columns)


def _scale(name: str, layer: nn.Linear, tensors: dict[str, torch.Tensor], strategy: str) -> None:
    scale = tensors.pop(f"{name}.weight_scale")
    if scale.shape != {"tensor": (), "channel": (len(layer.weight), 1)}[strategy]:
        raise AssertionError(f"{name}: param_data.shape == loaded_weight.shape")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() * scale
    given = tensors.pop(f"{name}.input_scale") if strategy == "tensor" else None

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        unit = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448 if given is None else given
        return ((x / unit).clamp(-448, 448).to(torch.float8_e4m3fn).float() * unit,)

    layer.register_forward_pre_hook(rounded)
