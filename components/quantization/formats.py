"""The recipe's formats as ModelOpt's configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth
from torch import nn

from trimtab.recipe import Quantization

_PRESETS = {
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int4_rtn": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
}


def configuration(
    format: str, group_size: int, exclude: tuple[str, ...], kv_cache: str = "none"
) -> dict[str, Any]:
    """Returns ModelOpt's configuration of one of its own formats, every linear layer in the same precision.

    Args:
        format: a name of `recipe.Format` other than bf16 and mixed.
        group_size: weights of a row that share a scale, for the INT4 formats.
        exclude: module name patterns that stay in 16 bits.
    """
    config = copy.deepcopy(getattr(mtq, _PRESETS[format]))
    for entry in config["quant_cfg"]:
        _set_group_size(entry, group_size)
    if kv_cache == "fp8":
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    config["quant_cfg"] += [{"quantizer_name": f"*{pattern}*", "enable": False} for pattern in exclude]
    return config


def mixed_configuration(assignment: Mapping[str, str], settings: Quantization) -> dict[str, Any]:
    """Returns the configuration that gives each named layer its own weight-only format."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer, format in assignment.items():
        preset = configuration(format, settings.group_size, settings.exclude)["quant_cfg"]
        weights = next(e for e in preset if e["quantizer_name"] == "*weight_quantizer" and "cfg" in e)
        entries.append({**weights, "quantizer_name": f"{layer}.weight_quantizer"})
    return {"quant_cfg": entries, "algorithm": "max"}


def apply_awq_scales(model: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Moves the found scales between input and weights of the layers in INT4, and sets the weights' ranges anew."""
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled and quantizer.num_bits == 4:
            apply_pre_quant_scale_and_smooth(module, scales[name])


def _set_group_size(entry: dict[str, Any], group_size: int) -> None:
    blocks = (entry.get("cfg") or {}).get("block_sizes") if isinstance(entry.get("cfg"), dict) else None
    if blocks and -1 in blocks:
        blocks[-1] = group_size
