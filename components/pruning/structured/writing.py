"""Writes what structured pruning leaves of a checkpoint, a shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from trimtab import families
from trimtab.base import progress
from trimtab.model.facts import inspect
from trimtab.model.headers import read_tensors
from trimtab.runtime.checkpoint import config_file, stream
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export


class Left(NamedTuple):
    """What is left of a model.

    `config` is the pruned model's. `rename` gives a tensor's name in it, None where the tensor is gone; `narrow`
    what is left of a tensor of that (old) name.
    """

    config: PreTrainedConfig
    rename: Callable[[str], str | None] = lambda name: name
    narrow: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor


def read_config(checkpoint: Path) -> PreTrainedConfig:
    """Returns the config of a model folder, for `Left` to change."""
    return config_file.read(checkpoint)


def write(checkpoint: Path, left: Left, output: Path, scratch: Path) -> None:
    """Writes an ordinary checkpoint of what is left; every tensor keeps its type. A kill costs the open shard.

    Raises:
        InputError: a weight that is not finite.
    """

    @torch.inference_mode()
    def convert(names: Sequence[str], title: str) -> dict[str, torch.Tensor]:
        shard = Export(checkpoint)  # opened anew: the pages that an open file has read count as memory
        written = {}
        for name in progress.track(names, "prune", f"narrowing {title}", len(names)):
            tensor = shard.view(name)
            check_finite(name, tensor)
            written[left.rename(name)] = left.narrow(name, tensor).contiguous()
        return written

    gone = [name for name in read_tensors(checkpoint) if left.rename(name) is None]
    facts = inspect(checkpoint)
    if facts.tied_embeddings:
        gone.append(f"{families.named(facts.model_type).head}.weight")
    stream.rewrite(checkpoint, output, scratch / "shards", gone, convert)
    stream.copy_the_rest(checkpoint, output)
    config_file.write(output, config_file.changed(checkpoint, left.config))
