"""The headers of safetensors files: what tensors a model stores, read without torch and without the tensors.

The format (github.com/huggingface/safetensors#format): eight bytes, the length N of the header, little endian; N bytes
of JSON that give each tensor's dtype, shape and place; then the tensors, without gaps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.base.errors import InputError
from trimtab.model.files import INDEX, is_computed, weight_files

#: Bytes of one element, by safetensors' names of the types.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: The safetensors library refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Tensor(NamedTuple):
    """A tensor as its file's header describes it; `begin` and `end` are bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a model folder by name, from the headers of the files that are the model.

    What transformers computes itself is not among them, see `model_files.is_computed`.

    Raises:
        InputError: no safetensors; a file that is missing, cut short or contradicts itself; a tensor twice.
    """
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    files = weight_files(folder)
    for shard in files.names:
        for tensor in read_header(folder / shard):
            if tensor.name in tensors:
                both = f"{owner[tensor.name]} and {shard}"
                raise InputError(f"{folder}: tensor {tensor.name} stands in both {both}; download them again")
            tensors[tensor.name], owner[tensor.name] = tensor, shard
    for name, shard in files.index.items():
        if owner.get(name) != shard:
            raise InputError(f"{folder}: {shard} lacks {name}, which {INDEX} promises; download it again")
    return {name: tensor for name, tensor in tensors.items() if not is_computed(name, tensor.shape)}


def read_header(path: Path) -> list[Tensor]:
    """Returns the tensors of one safetensors file in the order of their bytes, which stay unread.

    Raises:
        InputError: the file is a git-LFS pointer, cut short, or its tensors overlap or leave gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise InputError(f"{path}: is a git-LFS pointer of {size} bytes, no weights; run `git lfs pull`")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or 8 + length > size:
            raise InputError(f"{path}: is cut short: {size} bytes do not hold its header; download it again")
        if length > _MAX_HEADER_BYTES:
            raise InputError(f"{path}: is not safetensors: a header of {length} bytes is not allowed")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        tensors = [
            Tensor(name, entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not safetensors: its header cannot be read ({error})") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    place = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_BYTES:
            raise InputError(f"{path}: tensor {tensor.name} has the unknown type {tensor.dtype}")
        if tensor.begin != place:
            what = "overlaps the tensor before it" if tensor.begin < place else "leaves a gap before it"
            raise InputError(f"{path}: is damaged: tensor {tensor.name} {what}; download it again")
        if tensor.end - tensor.begin != math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
            raise InputError(f"{path}: is damaged: tensor {tensor.name} has another size than its shape says")
        place = tensor.end
    expected = 8 + length + place
    if expected != size:
        what = "is cut short" if expected > size else "has bytes that belong to no tensor"
        cut = next((f", so {tensor.name} is not whole" for tensor in tensors if 8 + length + tensor.end > size), "")
        raise InputError(f"{path}: {what}: {expected} bytes expected, {size} found{cut}; download it again")
    return tensors


def header_bytes(path: Path) -> int:
    """Returns where the tensors of a safetensors file begin."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"tensor {twice[0]} is named twice")
    return dict(pairs)
