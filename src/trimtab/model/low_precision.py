"""Weights that their publisher stores in low precision: which tensors hold them, and which the scales that belong there.

| `quant_method` | a weight | its scales |
|---|---|---|
| `fp8` (DeepSeek, Qwen, MiniMax, Mistral) | `W`, E4M3 | `W_scale_inv` or `W_scale`, by which it is multiplied: one for each block of `weight_block_size`, or one for all where the config has no such |
| `mxfp4` (gpt-oss) | `W_blocks`, U8 [experts, outputs, groups, 16]: 32 numbers in E2M1, the lower half of a byte first | `W_scales`, U8 [experts, outputs, groups]: powers of two, E8M0 |

The forms are those that transformers 5.14 reads (`integrations/finegrained_fp8.py`, `integrations/mxfp4.py`); E2M1 and
E8M0 are of OCP's Microscaling Formats 1.0. Every other form is refused: what it stands for is known to the engine that
it was made for, and a model that is read wrongly has numbers like any other.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.base.errors import InputError
from trimtab.model.files import CONFIG, quantizer_file
from trimtab.model.headers import Tensor

_FP8 = "F8_E4M3"
_SCALES = ("F32", "BF16", "F16")
#: Numbers of an MXFP4 group, and the bytes that hold them.
_MXFP4_GROUP, _MXFP4_BYTES = 32, 16
#: Scales of what an engine would round while it runs: no weight's.
_RUNNING = re.compile(r"(?:^|[._])(?:input|output|activation|q|k|v|kv)_scale(?:_inv)?$")
#: A tensor by this name is the scale of a weight, whatever the config says.
_OF_A_WEIGHT = re.compile(r"(?:_scale_inv|\.weight_scale)$")
_ASK = (
    "says that it is already quantized; give the 16-bit model it was made from, or one that is published in FP8 "
    "(quant_method 'fp8') or MXFP4 ('mxfp4')"
)


class Native(NamedTuple):
    """How a source says that it stores weights; `block` is what one scale is for, [outputs, inputs], None for all."""

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] | None = None

    @property
    def sentence(self) -> str:
        if self.method == "mxfp4":
            return "the source is MXFP4 in its experts; they are dequantised to BF16"
        scaled = "with block scales of {} x {}".format(*self.block) if self.block else "with one scale a tensor"
        return f"the source is FP8 {scaled}; it is dequantised to BF16"


class Stored(NamedTuple):
    """A tensor of the model as its source stores it.

    `name`, `dtype` and `shape` are those of the numbers that it stands for; `weight` and `scale` the stored tensors
    that they are decoded from. Where `decode` is "", the weight is those numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: str
    decode: Literal["", "fp8", "mxfp4"] = ""
    scale: str = ""
    block: tuple[int, int] | None = None


def declared(where: str, config: Mapping[str, Any]) -> Native | None:
    """Returns how a config says that the weights are stored, None where they are numbers of 16 or 32 bits.

    Args:
        where: what a refusal begins with.

    Raises:
        InputError: in a form that is not read.
    """
    for place, part in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(part, Mapping):
            continue
        for field in ("quantization_config", "compression_config"):
            if settings := part.get(field):
                return _native(where, place + field, settings)
    return None


def declared_in(folder: Path, config: Mapping[str, Any]) -> Native | None:
    """Returns what `declared` does; refuses too what a file beside the weights says.

    Raises:
        InputError: as `declared`.
    """
    native = declared(str(folder), config)
    if name := quantizer_file(folder):
        raise InputError(f"{folder}: {name} {_ASK}")
    return native


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that says no more of a quantization."""
    found = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = undeclared(text)
    return found


def stored(
    folder: Path, native: Native | None, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Returns each weight by the stored tensor that holds it, and the names of stored tensors that belong to none.

    Raises:
        InputError: a scale that is missing, left over, or not as its weight asks for.
    """
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if native and native.method == "fp8" and tensor.dtype == _FP8:
            found[name] = _fp8(folder, native, tensor, tensors)
        elif native and native.method == "mxfp4" and name.endswith("_blocks"):
            found[name] = _mxfp4(folder, tensor, tensors)
    if native and not found:
        raise InputError(
            f"{folder / CONFIG}: quantization_config says '{native.method}', and no tensor is stored so; remove the "
            f"field if these are the 16-bit weights, or download them again"
        )
    scales = {weight.scale for weight in found.values()}
    left_out = tuple(name for name in tensors if native and name not in scales and _RUNNING.search(name))
    for name, tensor in tensors.items():
        if name in found or name in scales or name in left_out:
            continue
        if tensor.dtype.startswith("F8_") or name.endswith(("_blocks", "_scales")) and tensor.dtype == "U8":
            said = f"quantization_config says '{native.method}'" if native else "there is no quantization_config"
            raise InputError(f"{folder / CONFIG}: {said}, and {name} is {tensor.dtype}; download both again")
        if _OF_A_WEIGHT.search(name):
            weight = re.sub(r"_scale(?:_inv)?$", "", name)
            what = f"{weight} is {tensors[weight].dtype}" if weight in tensors else f"there is no {weight}"
            raise InputError(f"{folder}: {name} is the scale of a weight in FP8, and {what}; download it again")
        found[name] = Stored(name, tensor.dtype, tensor.shape, name)
    return found, left_out


def _native(where: str, field: str, settings: Any) -> Native:
    settings = settings if isinstance(settings, Mapping) else {}
    method, form = settings.get("quant_method"), settings.get("format")
    if method == "fp8" and field.endswith("quantization_config"):
        block = settings.get("weight_block_size")
        if block is None:
            return Native("fp8")
        whole = isinstance(block, list) and all(type(size) is int and size > 0 for size in block)
        if not whole or len(block) != 2:
            what = "the sizes of a block are two whole numbers above 0, such as [128, 128]"
            raise InputError(f"{where}: {field}.weight_block_size of {CONFIG} is {block!r}, and {what}")
        return Native("fp8", (block[0], block[1]))
    if method == "mxfp4" and field.endswith("quantization_config"):
        return Native("mxfp4")
    said = (f", '{method}'" if method else "") + (f" in the form '{form}'," if form else "")
    raise InputError(f"{where}: {field} of {CONFIG}{said} {_ASK}")


def _fp8(folder: Path, native: Native, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Stored:
    scales = [name for name in (f"{tensor.name}_scale_inv", f"{tensor.name}_scale") if name in tensors]
    if not scales:
        raise InputError(f"{folder}: {tensor.name}_scale_inv is missing, the scale of {tensor.name}; download it again")
    if len(scales) > 1:
        raise InputError(f"{folder}: {scales[0]} and {scales[1]} are both scales of {tensor.name}; remove one")
    scale = tensors[scales[0]]
    *lead, outputs, inputs = tensor.shape if len(tensor.shape) > 1 else (0, 0)
    if native.block:
        asked = [(*lead, -(-outputs // native.block[0]), -(-inputs // native.block[1]))]
    else:
        asked = [(), (1,), (1, 1)] if not lead else [(*lead, 1, 1)]
    if len(tensor.shape) < 2 or scale.shape not in asked or scale.dtype not in _SCALES:
        per = "blocks of {} x {}".format(*native.block) if native.block else "one scale a tensor"
        raise InputError(
            f"{folder}: {scale.name} is {scale.dtype} {[*scale.shape]}, and {tensor.name}, {[*tensor.shape]}, asks "
            f"for {_SCALES[0]} {[*asked[0]]} ({per}, by config.json); download it again"
        )
    return Stored(tensor.name, "BF16", tensor.shape, tensor.name, "fp8", scale.name, native.block)


def _mxfp4(folder: Path, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Stored:
    name = tensor.name.removesuffix("_blocks")
    scale = tensors.get(f"{name}_scales")
    if scale is None:
        raise InputError(f"{folder}: {name}_scales is missing, the scales of {tensor.name}; download it again")
    if tensor.dtype != "U8" or len(tensor.shape) != 4 or tensor.shape[-1] != _MXFP4_BYTES:
        what = f"{tensor.name} is {tensor.dtype} {[*tensor.shape]}"
        known = f"MXFP4 is U8 [experts, outputs, groups, {_MXFP4_BYTES}]"
        raise InputError(f"{folder}: {what}, and {known}; give another model")
    if (scale.dtype, scale.shape) != ("U8", tensor.shape[:-1]):
        what = f"{scale.name} is {scale.dtype} {[*scale.shape]}"
        raise InputError(f"{folder}: {what}, and its blocks ask for U8 {[*tensor.shape[:-1]]}; download it again")
    shape = (*tensor.shape[:2], tensor.shape[2] * _MXFP4_GROUP)
    return Stored(name, "BF16", shape, tensor.name, "mxfp4", scale.name)
