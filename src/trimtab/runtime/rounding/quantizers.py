"""How a weight is rounded and packed: from the weights of layers that share an input to the tensors that ModelOpt's
export holds.

INT8 and FP8 numbers are packed by ModelOpt's own functions; those of four bits here, since its packer of INT4 takes ten
times as long as it needs, and those of FP4 find the scales themselves. Matrices are gone through in slices of whole
rows, so that there is no float32 copy of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight

from trimtab.catalog.formats import FORMATS
from trimtab.catalog.numbers import NUMBERS
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import Quantized, layout_of, pack_e2m1, pack_int4, unpack_int4
from trimtab.runtime.rounding import scales
from trimtab.runtime.rounding.scales import FP8, INT4, INT8, MXFP4, Numbers

#: How weights are rounded, by the type of their numbers, where scales are plain.
_NUMBERS = {"int8": INT8, "int4": INT4, "e4m3": FP8}
#: How whole numbers, or E2M1, of a matrix become bytes, by the axis along which two share one.
_PACKED = {"out": lambda numbers: pack_int4(numbers.to(torch.int8)), "in": pack_e2m1}
_SCALE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Weights of a slice: on a CPU float32 temporaries of 4 MiB stay in the cache; on a GPU a slice is large enough that
#: launching kernels is no share of the time.
SLICE = {"cpu": 1 << 20, "cuda": 1 << 25}


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
        importance: what the error of a weight counts, [in], or of all pairs in a row, [in, in], where scales are
            searched; None takes them from the largest weight.
        largest: the largest magnitude in any layer of the input, where these are not all of them.
    """
    numbers = numbers_of(form, weights.values(), largest)
    found = weight_scales(form, weights, settings, importance, numbers, largest)
    return {name: pack(form, weight, found[name], settings, numbers) for name, weight in weights.items()}


def weight_scales(
    form: str,
    weights: Mapping[str, torch.Tensor],
    settings: Quantization,
    importance: torch.Tensor | None,
    numbers: Numbers,
    largest: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the scales of layers that share an input, float32, by layer: as `row_scales` has them; or where a whole
    tensor has one, the same scalar for all of them, as engines want that fuse them.

    Args:
        weights, importance, largest: as for `round_weights`.
        numbers: as `numbers_of` gives them.
    """
    if FORMATS[form].storage.scale != "tensor":
        return {n: row_scales(form, weight, settings, importance, numbers) for n, weight in weights.items()}
    amax = largest_of(weights.values()) if largest is None else largest
    if importance is None:
        return dict.fromkeys(weights, numbers.scale(amax))
    parts = (part for weight in weights.values() for (part,) in _slices(weight))
    return dict.fromkeys(weights, scales.searched_for_all(parts, amax, numbers, importance))


def row_scales(
    form: str, weight: torch.Tensor, settings: Quantization, importance: torch.Tensor | None, numbers: Numbers
) -> torch.Tensor:
    """Returns a matrix's scales where each row has one, float32 [out], or each group of a row, [out, in / group].

    Args:
        importance: as for `round_weights`.
        numbers: as `numbers_of` gives them.
    """
    size = layout_of(form, settings).group_size
    if size and importance is not None:
        importance = _within_groups(importance, size)
    found = []
    for (part,) in _slices(weight):
        blocks = part.unflatten(1, (-1, size)) if size else part
        if importance is None:
            found.append(scales.from_maximum(blocks, numbers))
        else:
            found.append(scales.searched(blocks, numbers, importance))
    return torch.cat(found)


def _within_groups(importance: torch.Tensor, size: int) -> torch.Tensor:
    """What errors count by group: [in] -> [groups, size]; [in, in] -> [groups, size, size], the pairs of a group."""
    if importance.dim() == 1:
        return importance.unflatten(0, (-1, size))
    return importance.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def pack(
    form: str, weight: torch.Tensor, scale: torch.Tensor, settings: Quantization, numbers: Numbers
) -> Quantized:
    """Returns a matrix rounded at given scales, of a tensor, rows or groups.

    Args:
        weight: floating point [out, in].
        scale: float32, as `row_scales` returns it, or a scalar where the whole tensor has one.
        numbers: those that the scale was found for.
    """
    layout, parts = layout_of(form, settings), []
    storage, size = layout.storage, layout.group_size
    for part, some in _slices(weight, scale.expand(len(weight)) if scale.dim() == 0 else scale):
        if storage.number.packed or size:
            blocks = part.unflatten(1, (-1, size or part.shape[1]))
            rounded = numbers.round(blocks / some.reshape(len(part), -1, 1)).flatten(1)
            packer = _PACKED.get(storage.number.packed)
            parts.append(packer(rounded) if packer else rounded.to(layout.dtype))
            continue
        if storage.number.mantissa is not None:  # a searched scale may clip, and what overflows is NaN
            part = part.clamp(-numbers.largest * some[:, None], numbers.largest * some[:, None])
        parts.append(to_quantized_weight(part, some if scale.dim() else scale, storage.modelopt))
    packed, kept = torch.cat(parts), {}
    if storage.second_scale == "rounded":
        largest = (unpack_int4(packed).unflatten(1, (-1, size)).abs().amax(-1) * scale).max()
        kept = {"weight_scale_2": scales.scale_of(largest, NUMBERS[storage.inputs.numbers].largest)}
    elif storage.second_scale == "blocks":
        kept = {"weight_scale_2": numbers.unit}
    return Quantized(layout, packed, numbers.code(scale), **kept)


def numbers_of(
    form: str, weights: Iterable[torch.Tensor] = (), largest: torch.Tensor | None = None
) -> Numbers:
    """Returns how the weights of layers that read the same input are rounded, and which scales there are for them.

    Args:
        weights: of the layers, floating point [out, in] each; only NVFP4 looks at them, whose scales share a unit.
        largest: the largest magnitude in any layer of the input, where `weights` are not all of them.
    """
    storage = FORMATS[form].storage
    if storage.second_scale == "blocks":
        return scales.nvfp4(largest_of(weights) if largest is None else largest)
    if storage.scale_type == "e8m0":
        return MXFP4
    return replace(_NUMBERS[storage.numbers], scale_dtype=_SCALE_TYPES[storage.scale_type])


def largest_of(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the largest magnitude in any of the matrices, a float32 scalar."""
    return torch.stack([torch.stack(weight.aminmax()).abs().max() for weight in weights]).max().float()


def slice_rows(weight: torch.Tensor) -> int:
    """Returns the rows of a slice: an even number, because INT4 packs them in pairs."""
    return 2 * max(1, SLICE[weight.device.type] // weight.shape[1] // 2)


def _slices(weight: torch.Tensor, *beside: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields a matrix in slices, float32, each with the same rows of what stands beside it."""
    rows = slice_rows(weight)
    for part, *others in zip(*(tensor.split(rows) for tensor in (weight, *beside)), strict=True):
        yield part.float(), *others
