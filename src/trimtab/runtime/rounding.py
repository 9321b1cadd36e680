"""How a weight is rounded and packed: from the weights of layers that share an input to the tensors that ModelOpt's
export holds.

The numbers are packed by ModelOpt's own functions, except INT4's, whose packer takes ten times as long as it needs.
Matrices are gone through in slices of whole rows, so that there is no float32 copy of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

from trimtab.recipe import Quantization
from trimtab.runtime import scales
from trimtab.runtime.formats import E2M1_MAX, E4M3_MAX, Quantized, layout_of, pack_int4, unpack_int4
from trimtab.runtime.scales import FP8, INT4, INT8, Numbers

#: ModelOpt's own name of each quant_algo.
MODELOPT_NAMES = {
    "W8A16": "int8_wo",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4",
    "W4A8_MXFP4_FP8": "w4a8_mxfp4_fp8",
}
#: Formats in which the layers that share an input share a scale.
SHARED_SCALES = ("fp8", "nvfp4")
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
        form: a key of `formats.ALGORITHMS`.
        weights: floating point [out, in] each.
        settings: the group size.
        importance: what the error of a weight counts, [in], where scales are searched; None takes them from the
            largest weight.
        largest: the largest magnitude in any layer of the input, where these are not all of them.
    """
    if form == "mxfp4":
        return {name: _mxfp4(weight, settings) for name, weight in weights.items()}
    if form in SHARED_SCALES:
        amax = largest_of(weights.values()) if largest is None else largest
        if form == "nvfp4":
            return {name: _nvfp4(weight, settings, amax) for name, weight in weights.items()}
        return _fp8(weights, settings, importance, amax)
    return {
        name: pack(form, weight, row_scales(form, weight, settings, importance), settings)
        for name, weight in weights.items()
    }


def row_scales(
    form: str, weight: torch.Tensor, settings: Quantization, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns a matrix's scales for INT8, FP8 per channel, float32 [out], and INT4, [out, in / group].

    Args:
        importance: as for `round_weights`.
    """
    size = layout_of(form, settings).group_size
    numbers: Numbers = INT4 if size else INT8 if form.startswith("int8") else FP8
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
    """Returns a matrix rounded at given scales: INT8, FP8 or INT4.

    Args:
        weight: floating point [out, in].
        scale: float32, as `row_scales` returns it, or a scalar for FP8.
    """
    layout, parts = layout_of(form, settings), []
    size, name = layout.group_size, MODELOPT_NAMES[layout.algo]
    for part, some in _slices(weight, scale.expand(len(weight)) if scale.dim() == 0 else scale):
        if size:
            numbers = INT4.round(part.unflatten(1, (-1, size)) / some[..., None])
            parts.append(pack_int4(numbers.flatten(1).to(torch.int8)))
            continue
        if layout.storage.dtype == torch.float8_e4m3fn:  # a searched scale may clip, and what overflows is NaN
            part = part.clamp(-E4M3_MAX * some[:, None], E4M3_MAX * some[:, None])
        parts.append(to_quantized_weight(part, some if scale.dim() else scale, name))
    packed, kept = torch.cat(parts), {}
    if form == "w4a8_awq":
        largest = (unpack_int4(packed).unflatten(1, (-1, size)).abs().amax(-1) * scale).max()
        kept = {"weight_scale_2": scales.scale_of(largest, E4M3_MAX)}
    return Quantized(layout, packed, scale.bfloat16() if size else scale, **kept)


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


def _fp8(
    weights: Mapping[str, torch.Tensor], settings: Quantization, importance: torch.Tensor | None, amax: torch.Tensor
) -> dict[str, Quantized]:
    """One scale for all of the group, as engines want that fuse its layers."""
    if importance is None:
        scale = FP8.scale(amax)
    else:
        parts = (part for weight in weights.values() for (part,) in _slices(weight))
        scale = scales.searched_for_all(parts, amax, FP8, importance)
    return {name: pack("fp8", weight, scale, settings) for name, weight in weights.items()}


def _nvfp4(weight: torch.Tensor, settings: Quantization, amax: torch.Tensor) -> Quantized:
    layout, packed, scale = layout_of("nvfp4", settings), [], []
    second = scales.scale_of(amax, E2M1_MAX * E4M3_MAX)
    for (part,) in _slices(weight):
        scale.append(NVFP4QTensor.get_weights_scaling_factor(part, layout.group_size, second)[0])
        packed.append(to_quantized_weight(part, scale[-1], MODELOPT_NAMES[layout.algo], second, layout.group_size))
    return Quantized(layout, torch.cat(packed), torch.cat(scale), weight_scale_2=second)


def _mxfp4(weight: torch.Tensor, settings: Quantization) -> Quantized:
    layout, packed, scale = layout_of("mxfp4", settings), [], []
    for (part,) in _slices(weight):
        numbers, exponents = MXFP4QTensor.quantize(part, block_size=layout.group_size)
        packed.append(numbers._quantized_data)
        scale.append(exponents.reshape(len(part), -1))
    return Quantized(layout, torch.cat(packed), torch.cat(scale))
