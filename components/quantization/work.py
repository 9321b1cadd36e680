"""Quantizes a checkpoint and exports it as a unified Hugging Face checkpoint, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab import progress
from trimtab.components.quantization import allocation, formats
from trimtab.components.quantization.sensitivity import read as read_sensitivity
from trimtab.recipe import Quantization
from trimtab.runtime import checkpoint as checkpoints


def quantize(
    checkpoint: str,
    calibration: str | None,
    sensitivity: str | None,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
) -> dict[str, float]:
    """Quantizes with ModelOpt and writes the export: weights, scales, config, tokenizer.

    Returns:
        bytes (of all safetensors), effective_bits (mean over the quantized weights; `mixed` only).

    Raises:
        Failure: `unsupported`, a bit budget that no assignment meets.
    """
    settings = Quantization.model_validate(parameters)
    folder = Path(output)
    if settings.format == "bf16":
        model, tokenizer = checkpoints.load(Path(checkpoint), torch.bfloat16)
        checkpoints.save(model, tokenizer, folder)
        return {"bytes": checkpoints.weight_file_bytes(folder)}
    model, tokenizer = checkpoints.load(Path(checkpoint), torch.float32)
    metrics: dict[str, float] = {}
    if settings.format == "mixed":
        groups = read_sensitivity(Path(sensitivity))
        assignment = allocation.allocate(groups, settings.effective_bits)
        metrics["effective_bits"] = allocation.effective_bits(groups, assignment)
        config = formats.mixed_configuration(assignment, settings)
    else:
        config = formats.configuration(
            settings.format, settings.group_size, settings.exclude, settings.kv_cache
        )
    tokens = load_file(Path(calibration) / "tokens.safetensors")["tokens"].long() if calibration else None
    if settings.format == "int4_awq":  # the search is done: its scales are in the sensitivity tree
        config["algorithm"] = "max"
    with torch.inference_mode():
        mtq.quantize(model, config, _forward_loop(tokens, settings.format))
        if sensitivity:
            formats.apply_awq_scales(model, load_file(Path(sensitivity) / "awq.safetensors"))
    progress.report("quantize", "exporting")
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        _store_in_16_bits(path)
    return {"bytes": checkpoints.weight_file_bytes(folder), **metrics}


def _forward_loop(tokens: torch.Tensor | None, format: str) -> Any:
    """Formats that quantize activations see every calibration window, one at a time; the others need none."""
    if tokens is None or format not in ("int8_sq", "fp8"):
        return None

    def run(model: Any) -> None:
        for window in progress.track(tokens, "quantize", "running calibration text", len(tokens)):
            model(window[None], logits_to_keep=1)

    return run


def _store_in_16_bits(path: Path) -> None:
    """Rewrites a file with its float32 weights as bfloat16, the precision of the source checkpoint.

    The model is quantized in float32, so that scales are chosen on unrounded numbers; what stays unquantized
    came from bfloat16 and goes back to it. One scale a layer or channel keeps float32; INT4's scale of every
    group, which costs a sixteenth of the weights, is a bfloat16 as the engines read it.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        per_channel_scale = name.endswith("_scale") and tensor.dim() < 2
        if tensor.dtype == torch.float32 and not per_channel_scale:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, metadata=metadata)
