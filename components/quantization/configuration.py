"""config.json and hf_quant_config.json of an export, through ModelOpt's own functions."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config

from trimtab import families
from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.model.facts import ModelFacts
from trimtab.model.files import CONFIG, read_json
from trimtab.runtime.checkpoint import config_file
from trimtab.runtime.checkpoint.layer_layout import Layout
from trimtab.runtime.checkpoint.model_files import Export


def write(
    folder: Path, facts: ModelFacts, layouts: Mapping[str, Layout], kv_cache: str, dtype: torch.dtype
) -> None:
    """Says in the export's config.json, and in hf_quant_config.json, how its layers and its KV cache are stored.

    Args:
        folder: holds the source's config.json.
        layouts: of each quantized layer.
        kv_cache: the recipe's.
        dtype: of everything that is not quantized.
    """
    config = config_file.with_dtype(read_json(folder / CONFIG), dtype)
    if layouts or kv_cache != "none":
        # Readers take every matrix for quantized that is not excluded: routers, and what stands beside the text model.
        matrices = Export(folder).matrices
        own = {"producer": _producer(), "quantization": _quantization(facts, layouts, kv_cache, matrices)}
        (folder / "hf_quant_config.json").write_text(json.dumps(own, indent=4), encoding="utf-8")
        config["quantization_config"] = convert_hf_quant_config_format(own)
    config_file.write(folder, config)


def _producer() -> dict[str, str]:
    return {"name": "modelopt", "version": importlib.metadata.version("nvidia-modelopt")}


def _quantization(
    facts: ModelFacts, layouts: Mapping[str, Layout], kv_cache: str, plain: Sequence[str]
) -> dict[str, Any]:
    layers = {}
    known = dict.fromkeys((*(linear.name for linear in facts.linears), families.named(facts.model_type).head))
    for layer in (*known, *(name for name in plain if name not in known)):
        layout = layouts.get(layer)
        layers[f"{layer}.quantization"] = layout.storage.modelopt if layout else None
        if layout and layout.group_size:
            layers[f"{layer}.awq_block_size"] = layout.group_size
    found = process_layer_quant_config(layers)
    if "quantized_layers" in found:  # where ModelOpt names no others, which TensorRT-LLM and vLLM would look for
        found["exclude_modules"] = sorted(layer for layer in (*known, *plain) if layer not in layouts)
    for layout in {*layouts.values()}:  # of formats that ModelOpt has no name for, it leaves the group size out
        for entry in found.get("quantized_layers", {}).values() if "quantized_layers" in found else [found]:
            if layout.group_size and entry.get("quant_algo") == layout.algo:
                entry.setdefault("group_size", layout.group_size)
    found["kv_cache_quant_algo"] = KV_CACHES[kv_cache].algorithm
    return found
