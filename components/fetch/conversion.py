"""Writes a model in the house's layout, a tensor at a time: memory holds the largest of them, not a shard.

What becomes of each stored tensor is known from the headers (`trimtab.model.layouts`), so a shard's header is written
first and its tensors behind it.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from trimtab import families
from trimtab.base import progress
from trimtab.components.fetch import decoding
from trimtab.families.fusion import block_of
from trimtab.model import low_precision
from trimtab.model.files import CONFIG, INDEX, SINGLE, companions, read_json, weight_files
from trimtab.model.headers import DTYPE_BYTES, Tensor, header_bytes, read_header, read_tensors
from trimtab.model.layouts import Layout, Piece, layout
from trimtab.runtime.checkpoint.finite import check_finite

#: Bytes of a shard; what lies in one file is uploaded and downloaded as one.
SHARD_BYTES = 4 << 30
_CHUNK = 16 << 20
_FLOATS = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: What is only moved is moved as numbers of its size.
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert(source: str, output: str) -> None:
    """Fills `output` with the model of the folder `source` in the house's layout.

    config.json loses its quantization where the weights were dequantised, and the text model of a wrapper gets its
    settings in `text_config`, GPT-2 becomes a GPTBigCode; all else beside them is copied.

    Raises:
        InputError: as `layouts.layout`; or a scale or weight is NaN or infinite.
    """
    folder, target = Path(source), Path(output)
    config = read_json(folder / CONFIG)
    found = layout(folder, config, read_tensors(folder))
    stored = _Stored(folder)
    shards = _shards(found)
    names = [SINGLE] if len(shards) == 1 else [_shard(n, len(shards)) for n in range(1, len(shards) + 1)]
    said = "; ".join(found.sentences)
    pieces = progress.track(_order(shards, found), "fetch", f"converting: {said}", sum(map(len, shards)))
    for name, shard in zip(names, shards, strict=True):
        with (target / name).open("wb") as file:
            file.write(_header([found.pieces[tensor].tensor for tensor in shard]))
            for _ in shard:
                stored.write(next(pieces), file)
    next(pieces, None)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(piece.tensor.end - piece.tensor.begin for piece in found.pieces.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name in companions(folder):
        shutil.copyfile(folder / name, target / name)
    written = dict(families.as_fetched(config))
    if low_precision.declared(source, config):
        written = low_precision.undeclared(written)
    if written != config:
        text = json.dumps(written, indent=2, ensure_ascii=False)
        (target / CONFIG).write_text(text + "\n", encoding="utf-8")


def _shards(found: Layout) -> list[list[str]]:
    """The tensors of each shard, in the order of their bytes: what stands outside the blocks, then block by block."""
    shards: list[list[str]] = []
    held = 0
    for name in sorted(found.pieces, key=lambda name: (-1 if (block := block_of(name)) is None else block, name)):
        tensor = found.pieces[name].tensor
        size = tensor.end - tensor.begin
        if not shards or held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    # Wide numbers first, as the library orders them: each then lies at a multiple of its size.
    width = {name: DTYPE_BYTES[piece.tensor.dtype] for name, piece in found.pieces.items()}
    return [sorted(shard, key=lambda name: -width[name]) for shard in shards]


def _shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _order(shards: Sequence[Sequence[str]], found: Layout) -> Iterator[Piece]:
    return (found.pieces[name] for shard in shards for name in shard)


def _header(tensors: Sequence[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        end = place + tensor.end - tensor.begin
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": [*tensor.shape], "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Stored:
    """The tensors that a folder's files store, read as far as they are asked for."""

    def __init__(self, folder: Path):
        self._home: dict[str, tuple[Path, Tensor, int]] = {}
        for name in weight_files(folder).names:
            start = header_bytes(folder / name)
            self._home |= {tensor.name: (folder / name, tensor, start) for tensor in read_header(folder / name)}
        self._last: tuple[tuple[str, int | None], torch.Tensor] | None = None

    def write(self, piece: Piece, file: BinaryIO) -> None:
        """Appends the bytes of a piece."""
        if piece.copied:
            self._copy(piece.stored.weight, file)
            return
        made = self._expert(piece)
        if piece.transposed:
            made = made.t()
        if piece.heads:  # all queries, all keys, all values, which become those of each head
            made = made.unflatten(0, (3, piece.heads, -1)).transpose(0, 1).flatten(0, 2)
        if piece.rows:
            start, stop, step = piece.rows
            made = made[start:stop:step]
        file.write(made.contiguous().flatten().view(torch.uint8).numpy())

    def _copy(self, name: str, file: BinaryIO) -> None:
        path, tensor, start = self._home[name]
        left = tensor.end - tensor.begin
        with path.open("rb") as stored:
            stored.seek(start + tensor.begin)
            while chunk := stored.read(min(_CHUNK, left)):
                file.write(chunk)
                left -= len(chunk)

    def _expert(self, piece: Piece) -> torch.Tensor:
        """The numbers of a piece before its rows are chosen; gate and up, which follow each other, are read once."""
        if len(piece.tensor.shape) < 2:  # a bias between the two
            return self._decoded(piece)
        key = (piece.stored.weight, piece.expert)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next is made: memory holds one
            self._last = (key, self._decoded(piece))
        return self._last[1]

    def _decoded(self, piece: Piece) -> torch.Tensor:
        stored, expert = piece.stored, piece.expert
        weight = self._read(stored.weight, expert)
        if not stored.decode:
            return weight
        scale = self._read(stored.scale, expert)
        made = decoding.mxfp4(weight, scale) if stored.decode == "mxfp4" else decoding.fp8(weight, scale, stored.block)
        check_finite(stored.weight, made)
        return made

    def _read(self, name: str, expert: int | None) -> torch.Tensor:
        path, tensor, start = self._home[name]
        shape, begin, size = tensor.shape, tensor.begin, tensor.end - tensor.begin
        if expert is not None:
            shape, size = shape[1:], size // shape[0]
            begin += expert * size
        data = bytearray(size)
        with path.open("rb") as stored:
            stored.seek(start + begin)
            stored.readinto(data)
        dtype = _FLOATS.get(tensor.dtype) or _WIDTHS[DTYPE_BYTES[tensor.dtype]]
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
