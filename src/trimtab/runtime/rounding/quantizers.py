"""How a weight is rounded and packed: from the weights of layers that share an input to the tensors that ModelOpt's
export holds.

The numbers are packed by ModelOpt's own functions, except INT4's, whose packer takes ten times as long as it needs.
Matrices are gone through in slices of whole rows, so that there is no float32 copy of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

from trimtab.catalog.formats import FORMATS
from trimtab.catalog.numbers import NUMBERS
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import (
    E2M1_MAX,
    E4M3_MAX,
    Layout,
    Quantized,
    layout_of,
    pack_int4,
    unpack_int4,
)
from trimtab.runtime.rounding import scales
from trimtab.runtime.rounding.scales import FP8, INT4, INT8, Numbers

#: How weights are rounded, by the type of their numbers.
_NUMBERS = {"int8": INT8, "int4": INT4, "e4m3": FP8}
_SCALE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Weights of a slice: float32 temporaries of 4 MiB stay in a processor's cache.
SLICE = 1 << 20


def round_weights(
    form: str,
    weights: Mapping[str, torch.Tensor],
    settings: Quantization,
    importance: torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
) -> dict[str, Quantized]:
    """Returns the stored weights and weight scales of layers that share an input, by layer, rounded to nearest.

    Args:
        form: one of the catalog's that quantizes layers.
        weights: floating point [out, in] each.
        settings: the group size.
        importance: what the error of a weight counts, [in], where scales are searched; None takes them from the
            largest weight.
        largest: the largest magnitude in any layer of the input, where these are not all of them.
    """
    storage, layout = FORMATS[form].storage, layout_of(form, settings)
    amax = None
    if storage.shares_scale:
        amax = largest_of(weights.values()) if largest is None else largest
    if storage.scale == "block":
        round_blocks = _BLOCKS[storage.numbers, storage.scale_type]
        return {name: round_blocks(weight, layout, amax) for name, weight in weights.items()}
    if storage.scale == "tensor":
        return _one_scale(form, weights, settings, importance, amax)
    return {
        name: pack(form, weight, row_scales(form, weight, settings, importance), settings)
        for name, weight in weights.items()
    }


def row_scales(
    form: str, weight: torch.Tensor, settings: Quantization, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns a matrix's scales where each row has one, float32 [out], or each group of a row, [out, in / group].

    Args:
        importance: as for `round_weights`.
    """
    size, numbers = layout_of(form, settings).group_size, numbers_of(form)
    if size and importance is not None:
        importance = importance.unflatten(0, (-1, size))
    found = []
    for (part,) in _slices(weight):
        blocks = part.unflatten(1, (-1, size)) if size else part
        if importance is None:
            found.append(scales.from_maximum(blocks, numbers))
        else:
            found.append(scales.searched(blocks, numbers, importance))
    return torch.cat(found)


def pack(form: str, weight: torch.Tensor, scale: torch.Tensor, settings: Quantization) -> Quantized:
    """Returns a matrix rounded at given scales, of a tensor, rows or groups.

    Args:
        weight: floating point [out, in].
        scale: float32, as `row_scales` returns it, or a scalar where the whole tensor has one.
    """
    layout, numbers, parts = layout_of(form, settings), numbers_of(form), []
    storage, size = layout.storage, layout.group_size
    for part, some in _slices(weight, scale.expand(len(weight)) if scale.dim() == 0 else scale):
        if storage.number.packed or size:
            blocks = part.unflatten(1, (-1, size or part.shape[1]))
            rounded = numbers.round(blocks / some.reshape(len(part), -1, 1)).flatten(1)
            parts.append(pack_int4(rounded.to(torch.int8)) if storage.number.packed else rounded.to(layout.dtype))
            continue
        if storage.number.mantissa is not None:  # a searched scale may clip, and what overflows is NaN
            part = part.clamp(-numbers.largest * some[:, None], numbers.largest * some[:, None])
        parts.append(to_quantized_weight(part, some if scale.dim() else scale, storage.modelopt))
    packed, kept = torch.cat(parts), {}
    if storage.second_scale == "rounded":
        largest = (unpack_int4(packed).unflatten(1, (-1, size)).abs().amax(-1) * scale).max()
        kept = {"weight_scale_2": scales.scale_of(largest, NUMBERS[storage.inputs.numbers].largest)}
    return Quantized(layout, packed, scale.to(numbers.scale_dtype), **kept)


def numbers_of(form: str) -> Numbers:
    """Returns how weights are rounded in a format whose scales are those of a tensor, of rows or of groups."""
    storage = FORMATS[form].storage
    return replace(_NUMBERS[storage.numbers], scale_dtype=_SCALE_TYPES[storage.scale_type])


def largest_of(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the largest magnitude in any of the matrices, a float32 scalar."""
    return torch.stack([torch.stack(weight.aminmax()).abs().max() for weight in weights]).max().float()


def slice_rows(columns: int) -> int:
    """Returns the rows of a slice: an even number, because INT4 packs them in pairs."""
    return 2 * max(1, SLICE // columns // 2)


def _slices(weight: torch.Tensor, *beside: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields a matrix in slices, float32, each with the same rows of what stands beside it."""
    rows = slice_rows(weight.shape[1])
    for part, *others in zip(*(tensor.split(rows) for tensor in (weight, *beside)), strict=True):
        yield part.float(), *others


def _one_scale(
    form: str,
    weights: Mapping[str, torch.Tensor],
    settings: Quantization,
    importance: torch.Tensor | None,
    amax: torch.Tensor,
) -> dict[str, Quantized]:
    """One scale for all of the group, as engines want that fuse its layers."""
    numbers = numbers_of(form)
    if importance is None:
        scale = numbers.scale(amax)
    else:
        parts = (part for weight in weights.values() for (part,) in _slices(weight))
        scale = scales.searched_for_all(parts, amax, numbers, importance)
    return {name: pack(form, weight, scale, settings) for name, weight in weights.items()}


def _nvfp4(weight: torch.Tensor, layout: Layout, amax: torch.Tensor) -> Quantized:
    packed, scale = [], []
    second = scales.scale_of(amax, E2M1_MAX * E4M3_MAX)
    for (part,) in _slices(weight):
        scale.append(NVFP4QTensor.get_weights_scaling_factor(part, layout.group_size, second)[0])
        packed.append(to_quantized_weight(part, scale[-1], layout.storage.modelopt, second, layout.group_size))
    return Quantized(layout, torch.cat(packed), torch.cat(scale), weight_scale_2=second)


def _mxfp4(weight: torch.Tensor, layout: Layout, amax: None) -> Quantized:
    packed, scale = [], []
    for (part,) in _slices(weight):
        numbers, exponents = MXFP4QTensor.quantize(part, block_size=layout.group_size)
        packed.append(numbers._quantized_data)
        scale.append(exponents.reshape(len(part), -1))
    return Quantized(layout, torch.cat(packed), torch.cat(scale))


#: How weights are rounded whose blocks have a scale, by the types of numbers and scales: (weight, layout, the largest
#: magnitude of all layers that share a scale) -> its tensors.
_BLOCKS = {("e2m1", "e4m3"): _nvfp4, ("e2m1", "e8m0"): _mxfp4}
