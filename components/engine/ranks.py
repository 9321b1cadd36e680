"""Turns an export into a TensorRT-LLM checkpoint: a config.json, and a file of tensors for each rank.

| TensorRT-LLM | export |
|---|---|
| `transformer.vocab_embedding`, `transformer.ln_f`, `lm_head` | `model.embed_tokens`, `model.norm`, `lm_head` |
| `attention.qkv`, `attention.dense` | `self_attn.{q,k,v}_proj`, `self_attn.o_proj` |
| `mlp.fc`, `mlp.gate`, `mlp.proj` | `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj` |
| `input_layernorm`, `post_layernorm` | `input_layernorm`, `post_attention_layernorm` |

Rank r has the tensor-parallel part r mod tp of stage r div tp; a stage counts its blocks from 0. The embedding and the
head are split along the vocabulary. A tied head is written out. Source: TensorRT-LLM,
docs/source/legacy/architecture/checkpoint.md, and modelopt/torch/export/postprocess.py, 0.47.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from trimtab import families, progress
from trimtab.catalog.backends import BACKENDS
from trimtab.components.engine.rank_config import config
from trimtab.errors import Failure
from trimtab.recipe import Engine
from trimtab.runtime import formats, kv_cache, split
from trimtab.runtime.checkpoint import Export

#: What a layer stores, and TensorRT-LLM's name for it.
_PARTS = {
    "weight": "weight",
    "bias": "bias",
    "weight_scale": "weights_scaling_factor",
    "weight_scale_2": "weights_scaling_factor_2",
    "input_scale": "activation_scaling_factor",
    "pre_quant_scale": "prequant_scaling_factor",
}
#: Scales that a layer may have one of.
_SCALARS = ("weight_scale", "weight_scale_2", "input_scale")


class _Module(NamedTuple):
    """A linear layer of TensorRT-LLM: the layers it is made of with the units of each (0: row-parallel)."""

    name: str
    sources: tuple[tuple[str, int], ...]


def modules(settings: Mapping[str, Any], ranks: int) -> tuple[_Module, ...]:
    """Returns the linear layers of a block of a Llama with that config.json; `units` may not be torn apart by ranks."""
    heads = settings["num_attention_heads"]
    units = {"attention": heads, "kv": settings.get("num_key_value_heads") or heads, "ffn": ranks, "hidden": 0}
    before, dense, gate_up, down = families.of(settings).inputs
    gate, up = gate_up.layers
    parts = {
        "attention.qkv": before.layers,
        "attention.dense": dense.layers,
        "mlp.fc": (gate,),
        "mlp.gate": (up,),
        "mlp.proj": down.layers,
    }
    return tuple(
        _Module(name, tuple((layer.name, units[layer.outputs]) for layer in layers)) for name, layers in parts.items()
    )


def convert(export_folder: Path, folder: Path, settings: Engine) -> dict[str, Any]:
    """Writes the checkpoint of `settings.world_size` ranks, one rank in memory at a time; finished ranks are kept.

    Returns:
        What config.json says.

    Raises:
        Failure: `unsupported`, a model or a mix of formats that TensorRT-LLM's checkpoint cannot express;
            `export_damaged`, a tensor is missing, or layers that are one product there scale their input differently.
    """
    source = _Source(export_folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    world = range(settings.world_size)
    for rank in progress.track(world, "engine", "splitting the checkpoint over ranks", len(world)):
        path = folder / f"rank{rank}.safetensors"
        if not path.exists():
            pipeline, tensor = divmod(rank, settings.tensor_parallel_size)
            partial_path = path.with_suffix(".partial")
            save_file({n: t.contiguous().clone() for n, t in source.rank(tensor, pipeline).items()}, partial_path)
            partial_path.rename(path)
    document = config(source.settings, source.quantization(), settings)
    (folder / "config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return document


def unite(layers: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Gives layers that are one product in TensorRT-LLM the largest of their scalar scales, and returns them.

    FP8 weights whose own scale was smaller are rounded anew, as TensorRT-LLM's PyTorch back end does on loading.
    """
    layers = [dict(layer) for layer in layers]
    for part in _SCALARS:
        scales = [layer[part] for layer in layers if part in layer and layer[part].numel() == 1]
        largest = torch.stack([scale.flatten() for scale in scales]).amax(0) if scales else None
        for layer, scale in zip(layers, scales, strict=False):
            if part == "weight_scale" and not torch.equal(scale.flatten(), largest):
                weight = layer["weight"].float() * (scale / largest)
                layer["weight"] = weight.to(layer["weight"].dtype)
            layer[part] = largest
    return layers


class _Source:
    """An export, read as the ranks of an engine want it."""

    def __init__(self, folder: Path, engine: Engine):
        self.export, self.engine = Export(folder), engine
        self.settings: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        architecture = (self.settings.get("architectures") or [""])[0]
        served = BACKENDS[engine.backend].architectures
        if served and architecture not in served:
            what = f"{' and '.join(served)} alone, no {architecture or 'nameless model'}"
            raise Failure("unsupported", f"{engine.backend} builds {what}")
        self.dtype = getattr(torch, self.settings.get("dtype") or self.settings.get("torch_dtype") or "bfloat16")
        self.blocks = self.settings["num_hidden_layers"]
        if self.blocks % engine.pipeline_parallel_size:
            raise Failure("unsupported", f"{engine.pipeline_parallel_size} stages do not divide {self.blocks} blocks")
        self.family = families.of(self.settings)
        self.modules = modules(self.settings, engine.tensor_parallel_size)
        self.algorithm = self._algorithm()

    def _algorithm(self) -> str | None:
        found = {layout.algo for layout in self.export.layers.values()}
        if len(found) > 1:
            raise Failure("unsupported", f"trtllm-build takes one format a model, not {', '.join(sorted(found))}")
        return next(iter(found), None)

    def rank(self, tensor: int, pipeline: int) -> dict[str, torch.Tensor]:
        """Returns the tensors of one rank."""
        each = self.blocks // self.engine.pipeline_parallel_size
        found = {}
        for local in range(each):
            block = f"{self.family.blocks}.{pipeline * each + local}"
            for name, value in self._block(block, tensor).items():
                found[f"transformer.layers.{local}.{name}"] = value
        vocabulary = partial(split.padded_rows, rank=tensor, ranks=self.engine.tensor_parallel_size)
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if pipeline == 0:
            found["transformer.vocab_embedding.weight"] = vocabulary(self._plain(embedding))
        if pipeline == self.engine.pipeline_parallel_size - 1:
            found["transformer.ln_f.weight"] = self._plain(f"{self.family.last_norm}.weight")
            found["lm_head.weight"] = vocabulary(self._plain(head if self.export.has(head) else embedding))
        return found

    def _block(self, block: str, rank: int) -> dict[str, torch.Tensor]:
        found = {
            "input_layernorm.weight": self._plain(f"{block}.{self.family.attention.norm}.weight"),
            "post_layernorm.weight": self._plain(f"{block}.{self.family.mlp.norm}.weight"),
        }
        for module in self.modules:
            layers = [f"{block}.{name}" for name, _ in module.sources]
            parts = self._stored(layers)
            for part in parts[0]:
                pieces = [
                    self._split(part, stored[part], units, rank)
                    for stored, (_, units) in zip(parts, module.sources, strict=True)
                ]
                found[f"{module.name}.{_PARTS[part]}"] = self._joined(part, pieces, layers)
        return found | self._kv_cache_scales(block)

    def _stored(self, layers: list[str]) -> list[dict[str, torch.Tensor]]:
        """What the layers of a module store, whole; the same parts of each."""
        found = [self._layer(name) for name in layers]
        if len({frozenset(parts) for parts in found}) > 1:
            raise Failure("unsupported", f"{', '.join(layers)} are one product in TensorRT-LLM and stored differently")
        return unite(found)

    def _layer(self, name: str) -> dict[str, torch.Tensor]:
        bias = {"bias": self._plain(f"{name}.bias")} if self.export.has(f"{name}.bias") else {}
        if name not in self.export.layers:
            return {"weight": self._plain(f"{name}.weight"), **bias}
        layer = self.export.layer(name)
        # trtllm-build rounds these itself, into a layout of the GPU's own.
        if layer.layout.storage.product == ("int8", "row", None):
            return {"weight": formats.dequantize(layer).to(self.dtype), **bias}
        found = {part: tensor if part == "weight" else tensor.float() for part, tensor in layer.tensors.items()}
        if found["weight"].dtype == torch.uint8:
            found["weight"] = found["weight"].view(torch.int8)
        if layer.layout.storage.pre_quant_scale:
            folded = torch.ones(layer.shape[1])  # into the norm before it
            found["pre_quant_scale"] = found.get("pre_quant_scale", folded).flatten().to(self.dtype)
        return found | bias

    def _split(self, part: str, tensor: torch.Tensor, units: int, rank: int) -> torch.Tensor:
        ranks, tensor = self.engine.tensor_parallel_size, tensor.reshape(1) if tensor.dim() == 0 else tensor
        try:
            if units:
                return split.column_parallel(part, tensor, units, rank, ranks)
            return split.row_parallel(part, tensor, rank, ranks)
        except ValueError as error:
            raise Failure("unsupported", f"engine.tensor_parallel_size: {ranks}: {error}") from None

    def _joined(self, part: str, pieces: list[torch.Tensor], layers: list[str]) -> torch.Tensor:
        if len(pieces) == 1:
            return pieces[0]
        if part == "pre_quant_scale" and any(not torch.equal(piece, pieces[0]) for piece in pieces):
            what = f"{', '.join(layers)} are one product in TensorRT-LLM, and their {part} differ"
            raise Failure("export_damaged", what)
        if part == "pre_quant_scale" or pieces[0].numel() == 1:
            return pieces[0]
        if pieces[0].dtype == torch.float8_e4m3fn:  # which not every torch concatenates
            return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(torch.float8_e4m3fn)
        return torch.cat(pieces)

    def _kv_cache_scales(self, block: str) -> dict[str, torch.Tensor]:
        """One scale for keys, one for values, and the larger for versions that have a single one."""
        algorithm = self.export.kv_cache_algo
        if algorithm is None:
            return {}
        scales = kv_cache.scales(self.export, self.family, f"{block}.{self.family.attention.module}")
        for name, scale in scales.items():
            if scale is None:
                raise kv_cache.missing_scale(name, algorithm)
        key, value = (torch.tensor([scale]) for scale in scales.values())
        names = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
        return {f"attention.{n}": t for n, t in zip(names, (key, value, torch.maximum(key, value)), strict=True)}

    def _plain(self, name: str) -> torch.Tensor:
        return self.export.view(name).to(self.dtype)

    def quantization(self) -> dict[str, Any]:
        """Returns TensorRT-LLM's `quantization`."""
        found: dict[str, Any] = {"quant_algo": self.algorithm, "kv_cache_quant_algo": self.export.kv_cache_algo}
        if self.algorithm is None:
            return found
        group_size = max(layout.group_size for layout in self.export.layers.values())
        if group_size:
            found |= {"group_size": group_size, "has_zero_point": False, "pre_quant_scale": True}
        return found | {"exclude_modules": ["lm_head", *self._excluded()]}

    def _excluded(self) -> list[str]:
        """The modules that stay in 16 bits, by TensorRT-LLM's names, which count the blocks of each stage from 0."""
        found = []
        for module in self.modules:
            layers = [f"{self.family.blocks}.{n}.{module.sources[0][0]}" for n in range(self.blocks)]
            plain = [n for n, layer in enumerate(layers) if layer not in self.export.layers]
            if len(plain) == self.blocks:
                found.append(f"transformer.layers.*.{module.name}")
            elif plain and self.engine.pipeline_parallel_size > 1:
                reason = f"{module.name} is quantized in some blocks only, which stages of a pipeline cannot be told"
                raise Failure("unsupported", reason)
            else:
                found += [f"transformer.layers.{n}.{module.name}" for n in plain]
        return found
