"""Builds a model from an export without ever holding a float copy of its quantized weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.runtime.checkpoint.layer_layout import SCALES, Quantized
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.checkpoint.skeleton import family_of, kept_in_float32, put, skeleton
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
    replacements.cap_scores(model)
    cut = shards.cut(model, place) if place else None
    if cut:
        export = shards.ShardedExport(folder, cut)
    used = set()
    family = family_of(model)
    for group in fused.groups(export.layers, family) if fuse else ([name] for name in export.layers):
        used |= _replace(model, export, group, device)
    config = model.config.to_dict()
    used |= {name for name in export.names if family.is_beside(name, config)}
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


def _assign(model: PreTrainedModel, export: Export, names: list[str]) -> None:
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
        put(model, name, tensor.to(torch.float32 if kept_in_float32(model, name) else place.dtype))
