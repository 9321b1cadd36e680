"""Builds a model from an export without ever holding a float copy of its quantized weights."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trimtab import families
from trimtab.base.errors import Failure, InputError
from trimtab.runtime.checkpoint.layer_layout import SCALES, Quantized
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.kernels import replacements
from trimtab.runtime.kv_cache import emulated as cache
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.runtime.linear import choice, cpu_products, fused
from trimtab.runtime.parallel import shards
from trimtab.runtime.parallel.shards import Place


def assemble(
    folder: Path,
    device: torch.device,
    kv_cache: ServedKVCache = "export",
    place: Place | None = None,
    fuse: bool = True,
) -> PreTrainedModel:
    """Returns the model of an export folder in eval mode: packed linears, everything else in bfloat16.

    Args:
        kv_cache: "export" rounds keys and values as the export says, "none" leaves them in 16 bits.
        place: of this process among several, for its part of the model; None for the whole.
        fuse: makes one product of layers that read one input, see `runtime.linear.fused`; False is to compare with.

    Raises:
        InputError: no config, or an architecture that transformers does not know.
        Failure: `export_damaged`, a tensor is missing, superfluous or wrong; `unsupported`, a format, or a model that
            cannot be shared out.
    """
    export = Export(folder)
    model = skeleton(folder)
    cut = shards.cut(model, place) if place else None
    if cut:
        export = shards.ShardedExport(folder, cut)
    used = set()
    family = families.named(model.config.model_type)
    for group in fused.groups(export.layers, family) if fuse else ([name] for name in export.layers):
        used |= _replace(model, export, group, device)
    rest = [n for n in export.names if n not in used and not n.endswith((".k_scale", ".v_scale"))]
    _assign(model, export, rest)
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise Failure("export_damaged", f"{name.rpartition('.')[0]}: tensor {name} is missing")
    if kv_cache == "export":
        cache.apply(model, export)
    if cut:
        shards.join(model, cut)
    model = model.requires_grad_(False).eval().to(device)
    if fuse:
        fused.fuse_linears(model, family)
    cpu_products.use(model)
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """Returns the model with its parameters on the meta device; buffers such as rotary frequencies are real.

    Raises:
        InputError: no config, an architecture that transformers does not know, or one that no family describes.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(folder, error) from None
    families.of(config.to_dict(), f"{folder}/config.json")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(folder, error) from None
    for parameter in model.parameters():  # and no buffers: GPT-J's angles would be those of rounded frequencies
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    replacements.cap_scores(model)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _no_model(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder}: no model can be made of its config.json: {error}")


def _replace(model: nn.Module, export: Export, names: list[str], device: torch.device) -> set[str]:
    """Puts packed linears in the place of layers that read one input, one for all where their scales allow it, and
    returns the names of the tensors that they used."""
    layers, biases = zip(*(_read(model, export, name) for name in names), strict=True)
    biased = all(bias is not None for bias in biases)
    joined = fused.join(list(layers)) if len(names) > 1 and (biased or not any(b is not None for b in biases)) else None
    if joined:
        packed = choice.build(joined, torch.cat(biases) if biased else None, device)
        fused.place(model, names, packed, [layer.shape[0] for layer in layers])
    else:
        for name, layer, bias in zip(names, layers, biases, strict=True):
            model.set_submodule(name, choice.build(layer, bias, device))
    return {f"{name}.{part}" for name in names for part in ("weight", "bias", *SCALES)}


def _read(model: nn.Module, export: Export, name: str) -> tuple[Quantized, torch.Tensor | None]:
    """Returns a layer of the export and its bias, if the model has a place for it."""
    try:
        place = model.get_submodule(name)
    except AttributeError:
        raise Failure(
            "export_damaged", f"{name}: is quantized in the export, but the model has no such layer"
        ) from None
    layer = export.layer(name)
    expected = tuple(place.weight.shape) if isinstance(place, nn.Linear) else None
    if layer.shape != expected:
        found = f"{list(layer.shape)}, the model's {type(place).__name__} needs {list(expected or ())}"
        raise Failure("export_damaged", f"{name}: its weight has shape {found}")
    return layer, None if place.bias is None else export.tensor(f"{name}.bias")


def _assign(model: nn.Module, export: Export, names: list[str]) -> None:
    """Gives the model its unquantized tensors."""
    places = model.state_dict()
    for name in names:
        if name not in places:
            raise Failure("export_damaged", f"{name}: the export holds it, but the model has no place for it")
        tensor, place = export.tensor(name), places[name]
        if tensor.shape != place.shape or tensor.is_floating_point() != place.is_floating_point():
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise Failure(
                "export_damaged", f"{name}: is {found}, the model needs {place.dtype} {list(place.shape)}"
            )
        if tensor.element_size() == 1:
            raise Failure(
                "export_damaged", f"{name}: is {tensor.dtype}, but the export does not list it as quantized"
            )
        model.load_state_dict({name: tensor.to(place.dtype)}, strict=False, assign=True)
