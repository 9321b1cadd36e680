"""INT4 as vLLM reads it: ModelOpt's W4A16_AWQ written anew as compressed-tensors' `pack-quantized`, number for number.

| here | there |
|---|---|
| `weight`: uint8 [out / 2, in], two rows a byte | `weight_packed`: int32 [out, in / 8], the first of eight lowest |
| numbers in two's complement | numbers plus 8 |
| `weight_scale` [out, in / group] | the same, bit for bit |
| – | `weight_shape`: int64, out and in |
| `pre_quant_scale` [in] | the same; compressed-tensors has none, so vLLM needs the plugin of `runtime.vllm_plugin` |

vLLM 0.24 multiplies both with Machete or Marlin on a GPU (model_executor/kernels/linear): groups of 32, 64 or 128, any
number of outputs, since Marlin fills its tiles up with zeros, and scales in the model's own 16 bits. AutoAWQ's files
would have zero points besides, and GPTQ's an order of inputs; neither has a `pre_quant_scale`.

A scale of the input could be folded into the layer before it only by rounding what is stored there a second time, and
with fewer heads of values than of queries not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import fusion
from trimtab.errors import Failure
from trimtab.runtime import stream
from trimtab.runtime.checkpoint import Export
from trimtab.runtime.formats import SCALES, Quantized, unpack_int4

#: The only layers that are translated, and the groups that vLLM's kernels know.
ALGORITHM, GROUP_SIZES = "W4A16_AWQ", (32, 64, 128)
#: `quant_method` of a checkpoint that vLLM itself reads, and of one that it reads with trimtab's plugin.
PLAIN, SCALED = "compressed-tensors", "trimtab-int4"
#: Where the config lists the layers whose input is multiplied by a `pre_quant_scale`.
SCALED_LAYERS = "input_scaled_layers"
_BITS = 4


def is_needed(export: Path) -> bool:
    """Whether vLLM reads the export only after `translate`."""
    return any(layout.algo == ALGORITHM for layout in Export(export).layers.values())


def translate(export: Path, output: Path, scratch: Path) -> str:
    """Writes the checkpoint that vLLM reads in an export's place, and returns its `quant_method`.

    Args:
        export: has INT4 layers.
        output: the folder to fill.
        scratch: finished shards wait here.

    Raises:
        Failure: `unsupported`, layers that vLLM cannot be given so; names one and says why.
    """
    read = Export(export)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    _check(read, config["model_type"], dtype)
    scaled = [name for name in read.layers if read.has(f"{name}.pre_quant_scale")]
    config["quantization_config"] = _quantization(read, scaled)
    output.mkdir(parents=True, exist_ok=True)
    stream.rewrite(export, output, scratch, [], lambda names, _: _shard(Export(export), names, dtype))
    stream.copy_the_rest(export, output)
    (output / "hf_quant_config.json").unlink(missing_ok=True)
    (output / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config["quantization_config"]["quant_method"]


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Returns signed INT4 numbers as compressed-tensors packs them: int8 [out, in] -> int32 [out, in / 8]."""
    nibbles = (numbers + 8).to(torch.uint8)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)


def _shard(read: Export, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    written: dict[str, torch.Tensor] = {}
    for name in names:
        layer, _, part = name.rpartition(".")
        if layer not in read.layers or part not in ("weight", *SCALES):
            written[name] = read.view(name)
        elif part == "weight":
            written |= {f"{layer}.{other}": tensor for other, tensor in _layer(layer, read.layer(layer), dtype).items()}
    return written


def _layer(name: str, layer: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack(unpack_int4(layer.weight)),
        "weight_scale": _exactly(f"{name}.weight_scale", layer.weight_scale, dtype).reshape(layer.shape[0], -1),
        "weight_shape": torch.tensor(layer.shape),
    }
    if layer.pre_quant_scale is not None:
        scale = _exactly(f"{name}.pre_quant_scale", layer.pre_quant_scale, dtype)
        tensors["pre_quant_scale"] = scale.reshape(-1)
    return tensors


def _exactly(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the type in which vLLM holds it, if that changes no number."""
    held = tensor.to(dtype)
    if not torch.equal(held.to(tensor.dtype), tensor):
        raise Failure("unsupported", f"{name} is {tensor.dtype}, and vLLM would round it to the model's {dtype}")
    return held.contiguous()


def _quantization(read: Export, scaled: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors 0.17, as vLLM's CompressedTensorsConfig reads it."""
    group_size = next(iter(read.layers.values())).group_size
    weights = {"num_bits": _BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size,
               "dynamic": False}  # fmt: skip
    found: dict[str, Any] = {
        "quant_method": SCALED if scaled else PLAIN,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                                      "output_activations": None}},
        "ignore": sorted({*read.plain_layers, "lm_head"}),
    }  # fmt: skip
    if read.kv_cache_algo == "FP8":
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
        found["kv_cache_scheme"] = scheme
    return found | ({SCALED_LAYERS: list(scaled)} if scaled else {})


def _check(read: Export, model_type: str, dtype: torch.dtype) -> None:
    other = sorted({layout.algo for layout in read.layers.values()} - {ALGORITHM})
    if other:
        raise Failure("unsupported", f"vLLM reads no {ALGORITHM} beside {', '.join(other)}; write one format for all")
    sizes = sorted({layout.group_size for layout in read.layers.values()})
    if len(sizes) > 1 or sizes[0] not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        found = ", ".join(map(str, sizes))
        raise Failure("unsupported", f"group_size {found} is none for vLLM's INT4; write one of {known}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise Failure("unsupported", f"vLLM multiplies INT4 with 16 bits, and the model's dtype is {dtype}")
    if read.kv_cache_algo not in (None, "FP8"):
        raise Failure("unsupported", f"vLLM serves no {read.kv_cache_algo} KV cache beside INT4; write 'none' or 'fp8'")
    for group in fusion.groups([*read.layers, *read.plain_layers], model_type):
        _check_group(read, group.layers)


def _check_group(read: Export, layers: Sequence[str]) -> None:
    """vLLM multiplies the layers of a group at once: all in one format, of one input."""
    quantized = [layer for layer in layers if layer in read.layers]
    if len(quantized) not in (0, len(layers)):
        left = next(layer for layer in layers if layer not in read.layers)
        raise Failure("unsupported", f"vLLM fuses {quantized[0]} with {left}, which is in 16 bits; exclude both")
    scales = [f"{layer}.pre_quant_scale" for layer in quantized if read.has(f"{layer}.pre_quant_scale")]
    if scales and (
        len(scales) < len(layers) or any(not torch.equal(read.view(scales[0]), read.view(s)) for s in scales[1:])
    ):
        raise Failure("unsupported", f"vLLM fuses {layers[0]} with {layers[-1]}, whose pre_quant_scale is another")
