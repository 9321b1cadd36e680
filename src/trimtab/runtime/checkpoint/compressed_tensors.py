"""What vLLM does not read of ModelOpt's exports, written anew as compressed-tensors, number for number.

INT4, W4A16_AWQ, becomes `pack-quantized`:

| here | there |
|---|---|
| `weight`: uint8 [out / 2, in], two rows a byte | `weight_packed`: int32 [out, in / 8], the first of eight lowest |
| numbers in two's complement | numbers plus 8 |
| `weight_scale` [out, in / group] | the same, bit for bit |
| – | `weight_shape`: int64, out and in |
| `pre_quant_scale` [in] | the same; compressed-tensors has none, so vLLM needs `engines.vllm_plugin` |
| `pre_quant_scale` of ones | – |

vLLM 0.24 multiplies both with Machete or Marlin on a GPU (model_executor/kernels/linear): groups of 32, 64 or 128, any
number of outputs, since Marlin fills its tiles up with zeros, and scales in the model's own 16 bits. AutoAWQ's files
would have zero points besides, and GPTQ's an order of inputs; neither has a `pre_quant_scale`.

FP4 becomes `nvfp4-pack-quantized` or `mxfp4-pack-quantized`, byte for byte:

| here | there |
|---|---|
| `weight`: uint8 [out, in / 2] | `weight_packed` |
| `weight_scale` [out, in / block] | the same |
| `weight_scale_2` | `weight_global_scale` [1], which divides: its inverse |
| `input_scale` of NVFP4 | `input_global_scale` [1], its inverse |

A scale of the input could be folded into the layer before it only by rounding what is stored there a second time, and
with fewer heads of values than of queries not at all.

FP8, and NVFP4 with its inputs, are translated where the head is the embedding, since vLLM 0.24 cannot tie a head that
ModelOpt's config excludes, and beside formats that must be. FP8 becomes `float-quantized`: the tensors keep their names
and numbers; scales by row become [out, 1]. Several formats become groups of layers by name, each with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.formats import STORAGES, Storage
from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.families import fusion
from trimtab.model.configured import ties_embeddings
from trimtab.model.files import CONFIG, read_json
from trimtab.runtime.checkpoint import config_file, stream
from trimtab.runtime.checkpoint.layer_layout import SCALES, Layout, Quantized, unpack_int4
from trimtab.runtime.checkpoint.model_files import Export

#: compressed-tensors' words for what shares a scale, among the weights and among the inputs.
_WEIGHTS, _INPUTS = {"tensor": "tensor", "row": "channel"}, {"static": "tensor", "token": "token"}
_STATIC = {"symmetric": True, "dynamic": False}
#: `quant_method` of a checkpoint that vLLM itself reads, and of one that it reads with trimtab's plugin.
PLAIN, SCALED = "compressed-tensors", "trimtab-int4"
#: Where the config lists the layers whose input is multiplied by a `pre_quant_scale`.
SCALED_LAYERS = "input_scaled_layers"


def is_needed(export: Path) -> bool:
    """Whether vLLM reads the export only after `translate`."""
    found = {layout.storage for layout in Export(export).layers.values()}
    read_so = bool(found) and all(storage.vllm for storage in found)
    return any(map(_is_foreign, found)) or (read_so and ties_embeddings(_config(export)))


def _is_foreign(storage: Storage) -> bool:
    """Whether vLLM reads such layers only as compressed-tensors."""
    return storage.vllm == "compressed-tensors"


def translate(export: Path, output: Path, scratch: Path) -> str:
    """Writes the checkpoint that vLLM reads in an export's place, and returns its `quant_method`.

    Args:
        export: one of those of which `is_needed` is true.
        output: the folder to fill.
        scratch: finished shards wait here.

    Raises:
        Failure: `unsupported`, layers that vLLM cannot be given so; names one and says why.
    """
    read, config = Export(export), _config(export)
    dtype = config_file.declared_dtype(export)
    _check(read, config["model_type"], dtype)
    scaled = [name for name in read.layers if _scales_inputs(read, name)]
    config["quantization_config"] = _quantization(read, scaled, families.named(config["model_type"]).head)
    output.mkdir(parents=True, exist_ok=True)
    stream.rewrite(export, output, scratch, [], lambda names, _: _shard(Export(export), names, dtype))
    stream.copy_the_rest(export, output)
    (output / "hf_quant_config.json").unlink(missing_ok=True)
    config_file.write(output, config)
    return config["quantization_config"]["quant_method"]


def _config(export: Path) -> dict[str, Any]:
    return read_json(export / CONFIG)


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
            make = _TENSORS[read.layers[layer].storage.numbers]
            written |= {f"{layer}.{other}": tensor for other, tensor in make(layer, read.layer(layer), dtype).items()}
    return written


def _int4(name: str, layer: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack(unpack_int4(layer.weight)),
        "weight_scale": _exactly(f"{name}.weight_scale", layer.weight_scale, dtype).reshape(layer.shape[0], -1),
        "weight_shape": torch.tensor(layer.shape),
    }
    if layer.scales_inputs:
        scale = _exactly(f"{name}.pre_quant_scale", layer.pre_quant_scale, dtype)
        tensors["pre_quant_scale"] = scale.reshape(-1)
    return tensors


def _fp8(name: str, layer: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    scale = layer.weight_scale
    return layer.tensors | {"weight_scale": scale.unsqueeze(1) if scale.ndim == 1 else scale}


def _fp4(name: str, layer: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    globals_ = {"weight_global_scale": layer.weight_scale_2, "input_global_scale": layer.input_scale}
    inverse = {part: (1 / scale.float()).reshape(1) for part, scale in globals_.items() if scale is not None}
    return {"weight_packed": layer.weight, "weight_scale": layer.weight_scale, **inverse}


#: What makes a layer's tensors, by the type of its numbers: (name, layer, the model's type) -> tensors.
_TENSORS = {"int4": _int4, "e4m3": _fp8, "e2m1": _fp4}


def _exactly(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the type in which vLLM holds it, if that changes no number."""
    held = tensor.to(dtype)
    if not torch.equal(held.to(tensor.dtype), tensor):
        raise Failure("unsupported", f"{name} is {tensor.dtype}, and vLLM would round it to the model's {dtype}")
    return held.contiguous()


def _scales_inputs(read: Export, layer: str) -> bool:
    return read.has(f"{layer}.pre_quant_scale") and read.layer(layer).scales_inputs


def _quantization(read: Export, scaled: Sequence[str], head: str) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors 0.17, as vLLM's CompressedTensorsConfig reads it."""
    layouts = {layout: [name for name, other in read.layers.items() if other == layout]
               for layout in dict.fromkeys(read.layers.values())}  # fmt: skip
    groups = {}
    for number, (layout, names) in enumerate(layouts.items()):
        form, weights, inputs = _scheme(layout)
        targets = ["Linear"] if len(layouts) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, "format": form, "weights": weights,
                                     "input_activations": inputs, "output_activations": None}  # fmt: skip
    forms = {group["format"] for group in groups.values()}
    found: dict[str, Any] = {
        "quant_method": SCALED if scaled else PLAIN,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*read.plain_layers, head}),
    }
    if read.kv_cache_algo:
        found["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", **_STATIC}
    return found | ({SCALED_LAYERS: list(scaled)} if scaled else {})


def _scheme(layout: Layout) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """The format of such layers, and what it says of weights and inputs."""
    storage, inputs = layout.storage, layout.storage.inputs
    if storage.numbers == "int4":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": layout.group_size}
        return "pack-quantized", weights | _STATIC, None
    if storage.numbers == "e4m3":
        float8 = {"num_bits": 8, "type": "float", **_STATIC}
        given = float8 | {"strategy": _INPUTS[inputs.scale], "dynamic": inputs.scale == "token"}
        return "float-quantized", float8 | {"strategy": _WEIGHTS[storage.scale]}, given
    float4 = {"num_bits": 4, "type": "float", "group_size": storage.block, **_STATIC}
    if storage.scale_type == "e8m0":
        return "mxfp4-pack-quantized", float4 | {"strategy": "group", "scale_dtype": "torch.uint8"}, None
    float4 |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return "nvfp4-pack-quantized", float4, float4 | {"dynamic": "local"} if inputs else None


def _check(read: Export, model_type: str, dtype: torch.dtype) -> None:
    found = sorted({layout.algo for layout in read.layers.values()})
    strange = [algo for algo in found if not STORAGES[algo].vllm]
    if strange:
        known = next(algo for algo in found if algo not in strange)
        raise Failure("unsupported", f"vLLM reads no {known} beside {', '.join(strange)}; write one format for all")
    if any(STORAGES[algo].numbers == "int4" for algo in found):
        _check_int4(read)
    if any(map(_is_foreign, (STORAGES[algo] for algo in found))) and dtype not in (torch.bfloat16, torch.float16):
        what = "INT4" if any(STORAGES[algo].numbers == "int4" for algo in found) else "FP4"
        raise Failure("unsupported", f"vLLM multiplies {what} with 16 bits, and the model's dtype is {dtype}")
    served = {row.algorithm: name for name, row in KV_CACHES.items() if "vllm" in row.served}
    if read.kv_cache_algo not in (None, *served):
        known = " or ".join(f"'{name}'" for name in ("none", *served.values()))
        raise Failure("unsupported", f"vLLM serves no {read.kv_cache_algo} KV cache here; write {known}")
    for group in fusion.groups([*read.layers, *read.plain_layers], model_type):
        _check_group(read, group.layers)


def _check_int4(read: Export) -> None:
    sizes = sorted({layout.group_size for layout in read.layers.values() if layout.storage.numbers == "int4"})
    served = sorted(BACKENDS["vllm"].group_sizes)
    if len(sizes) > 1 or sizes[0] not in served:
        known = ", ".join(map(str, served))
        found = ", ".join(map(str, sizes))
        raise Failure("unsupported", f"group_size {found} is none for vLLM's INT4; write one of {known}")


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
