"""Does the export say what the recipe asked for? Seconds, before an evaluation is paid for."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from trimtab import progress
from trimtab.errors import Failure
from trimtab.model import Linear
from trimtab.model import inspect as read_facts
from trimtab.recipe import Quantization
from trimtab.runtime import formats, kv_cache
from trimtab.runtime.checkpoint import Export, weight_file_bytes

#: The largest relative error of one output channel. Four bits make 0.1 to 0.3; a wrong scale makes 1 and more.
MAX_CHANNEL_ERROR = 0.6
#: Bits that a quantized weight may take, with the scales of groups; those of rows and columns come on top.
MAX_BITS = {
    **dict.fromkeys(("int8_wo", "int8_sq", "fp8", "fp8_per_channel", "mixed"), 8.6),
    **dict.fromkeys(("int4_rtn", "int4_awq", "int4_gptq", "w4a8_awq", "nvfp4", "mxfp4"), 5.2),
}


def inspect(
    export: str, checkpoint: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Compares every layer of the export with its source and writes `layers.json`.

    Args:
        export: the exported checkpoint.
        checkpoint: what it was made from.
        parameters: the recipe's `quantize`, or {} for an export that is not quantized.

    Returns:
        quantized_share (bytes of the quantized tensors over their BF16 bytes), max_relative_error (of a layer), bytes.

    Raises:
        Failure: `export_damaged`; names the layer and what is wrong with it, its weights or its KV cache.
    """
    settings = Quantization.model_validate(parameters) if parameters else None
    read = Export(Path(export))
    source = Export(Path(checkpoint))
    check_kv_cache(settings.kv_cache if settings else "none", read, source)
    layers = []
    if settings and settings.format != "bf16":
        linears = {layer.name: layer for layer in read_facts(Path(checkpoint)).linears}
        wanted = {n for n in linears if not any(fnmatch(n, f"*{pattern}*") for pattern in settings.exclude)}
        left = sorted(wanted - set(read.layers))
        if left:
            raise Failure("export_damaged", f"{left[0]} is not quantized ({len(left)} layers in all)")
        for name in progress.track(
            sorted(wanted), "validate", "comparing layers with their source", len(wanted)
        ):
            layers.append(compare(name, read, source))
        bits = 16 * read.quantized_bytes / read.bf16_bytes
        most = MAX_BITS[settings.format] + _scale_bits([linears[name] for name in wanted])
        if bits > most:
            reason = f"quantized weights take {bits:.1f} bits each, {settings.format} allows {most:.1f}"
            raise Failure("export_damaged", reason)
    (Path(output) / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    return {
        "quantized_share": read.quantized_bytes / read.bf16_bytes if layers else 1.0,
        "max_relative_error": max((layer["relative_error"] for layer in layers), default=0.0),
        "bytes": weight_file_bytes(Path(export)),
    }


def check_kv_cache(asked: str, export: Export, source: Export) -> None:
    """Compares the KV cache of an export with the one that its recipe asks for.

    Both scales of every attention layer must be there, in FP8 too: ModelOpt writes whatever it calibrated,
    however small, so a scale that is absent was never measured, and TensorRT-LLM would take it for 1 in silence.

    Args:
        asked: the recipe's `kv_cache`.
        source: what the export was made from; its attention layers are those with a `k_proj`.

    Raises:
        Failure: `export_damaged`; names the layer: another format than asked for, or a scale that is missing or
            not one finite, positive number. `unsupported`; a model without such layers.
    """
    layers = sorted(name.removesuffix(_KEYS) for name in source.names if name.endswith(_KEYS))
    wanted, found = kv_cache.ALGORITHMS.get(asked), export.kv_cache_algo
    if found != wanted:
        where = f"{layers[0]} ({len(layers)} layers in all)" if layers else "the config"
        reason = f"{where}: the export says {found or '16 bits'} of its KV cache, the recipe asks for {asked}"
        raise Failure("export_damaged", reason)
    if wanted is None:
        return
    if not layers:
        raise Failure("unsupported", f"a KV cache in {asked}: the model has no attention layer with a k_proj")
    for layer in layers:
        for name, scale in kv_cache.scales(export, layer).items():
            if scale is None:
                raise kv_cache.missing_scale(name, wanted)


#: How the weight of an attention layer's keys ends.
_KEYS = ".k_proj.weight"


def _scale_bits(layers: list[Linear]) -> float:
    """Returns the bits a weight that one float32 a row and one a column take: much in small layers only."""
    scales = sum(layer.out_features + layer.in_features for layer in layers)
    return 32 * scales / sum(layer.parameters for layer in layers)


def compare(name: str, export: Export, source: Export) -> dict[str, Any]:
    """Returns a layer's cosine and relative error between source and dequantised weights, [out, in] each.

    Where AWQ or SmoothQuant moved a scale into the layer norm before the layer, the source is scaled alike:
    the norm's change tells by how much.

    Raises:
        Failure: `export_damaged`; a channel that does not resemble its source.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = formats.dequantize(export.layer(name).to(device))
    weight = source.tensor(f"{name}.weight").to(device).float()
    if stored.shape != weight.shape:
        raise Failure(
            "export_damaged", f"{name}: shape {list(stored.shape)} where the source has {list(weight.shape)}"
        )
    weight = weight / _norm_change(name, export, source).to(device)
    error = (stored - weight).norm(dim=1) / weight.norm(dim=1).clamp_min(1e-12)
    worst = int(error.argmax())
    if not error[worst] <= MAX_CHANNEL_ERROR:
        reason = f"{name}: output channel {worst} differs from its source by {error[worst]:.0%}"
        raise Failure("export_damaged", reason)
    return {
        "layer": name,
        "cosine": torch.cosine_similarity(stored.flatten(), weight.flatten(), dim=0).item(),
        "relative_error": ((stored - weight).norm() / weight.norm()).item(),
    }


#: The norm whose output a layer reads, in the naming that Llama's family shares.
_NORMS = {
    r"\.self_attn\.[qkv]_proj$": ".input_layernorm",
    r"\.mlp\.(gate|up)_proj$": ".post_attention_layernorm",
}


def _norm_change(name: str, export: Export, source: Export) -> torch.Tensor:
    """Returns by what each input channel of the layer was multiplied in the norm before it, [in] or one number."""
    for pattern, norm in _NORMS.items():
        tensor = f"{re.sub(pattern, norm, name)}.weight"
        if re.search(pattern, name) and tensor in source.names:
            return export.tensor(tensor).float() / source.tensor(tensor).float()
    return torch.ones(())
