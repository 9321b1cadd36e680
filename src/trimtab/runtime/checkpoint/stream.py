"""Rewrites a checkpoint a shard at a time, so that memory holds one shard and not the model.

A finished shard is renamed into the scratch folder and found there after a kill. Shards are runs of whole
transformer blocks, so that whatever a method does to the layers of a block, it has them together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.families.fusion import block_of
from trimtab.model.files import CONFIG, INDEX, SINGLE, companions, read_json
from trimtab.model.headers import Tensor, read_tensors
from trimtab.runtime.checkpoint import config_file

#: Bytes of the source that a shard is made from, unless a single block or tensor has more.
SHARD_BYTES = 512 << 20

Convert = Callable[[Sequence[str], str], Mapping[str, torch.Tensor]]


def plan(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Returns the names of the tensors, shard by shard: what stands outside the blocks first, then the blocks."""
    units: dict[tuple[int, str], list[str]] = {}
    for name in sorted(tensors):
        block = block_of(name)
        units.setdefault((-1, name) if block is None else (block, ""), []).append(name)
    shards: list[list[str]] = []
    held = 0
    for _, names in sorted(units.items()):
        size = sum(tensors[name].end - tensors[name].begin for name in names)
        if not shards or held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1] += names
        held += size
    return shards


def rewrite(
    source: Path,
    output: Path,
    scratch: Path,
    skip: Sequence[str],
    convert: Convert,
    written: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Writes a checkpoint whose tensors are what `convert` makes of those of `source`, a shard at a time.

    Args:
        source: a plain checkpoint.
        output: the folder to fill with safetensors and, for more than one file, their index.
        scratch: finished shards wait here; what an earlier try left is used.
        skip: tensors of the source that are left out.
        convert: (names of a shard's tensors, how to call the shard) -> the tensors to write. It is not called for
            a shard that is finished.
        written: called with the names of a shard's tensors once it is finished: what `convert` made it of may go.
    """
    tensors = {name: tensor for name, tensor in read_tensors(source).items() if name not in skip}
    shards = plan(tensors)
    scratch.mkdir(parents=True, exist_ok=True)
    done = [scratch / f"shard-{number:05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, (path, names) in enumerate(zip(done, shards, strict=True), start=1):
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(dict(convert(names, f"shard {number} of {len(shards)}")), partial, metadata={"format": "pt"})
            partial.rename(path)
            if written:
                written(names)
    _publish(done, output)
    # It goes at once: after a kill, what is left of it must not pass for shards whose sources have gone.
    emptied = scratch.with_name(f"{scratch.name}-emptied")
    shutil.rmtree(emptied, ignore_errors=True)
    scratch.rename(emptied)
    shutil.rmtree(emptied)


def copy_the_rest(source: Path, output: Path) -> None:
    """Config, tokenizer and chat template go along; weights and their index have been written anew."""
    for name in companions(source):
        if name != CONFIG:
            shutil.copyfile(source / name, output / name)
    config_file.write(output, read_json(source / CONFIG))


def _publish(shards: Sequence[Path], output: Path) -> None:
    """Gives the shards the names that transformers reads."""
    if len(shards) == 1:
        _link(shards[0], output / SINGLE)
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += shard.stat().st_size
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        _link(shard, output / name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """A second name for the file, or a copy on another file system: the shard stays until all are published."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
