"""Depth pruning: whole transformer blocks, those that change their input least."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.components.pruning.structured.writing import Left, read_config
from trimtab.families.fusion import block_of, in_block
from trimtab.model.facts import inspect


def least_influential(influence: torch.Tensor, count: int) -> list[int]:
    """Returns the indices of the `count` blocks with the lowest influence, in ascending order.

    Args:
        influence: [blocks]; one minus the mean cosine between a block's input and output.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
    """
    return sorted(influence.argsort(stable=True)[:count].tolist())


def least_influential_run(influence: torch.Tensor, count: int) -> list[int]:
    """Returns the indices of `count` consecutive blocks whose influence has the least sum; the first among equals.

    Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", take the angle between the input of a
    run and its output. Calibration measures each block apart, and the sum of its parts is what it has of a run.

    Args:
        influence: [blocks], at least `count`.
    """
    first = int(influence.unfold(0, count, 1).sum(dim=1).argmin())
    return list(range(first, first + count))


def without(checkpoint: Path, removed: Collection[int]) -> Left:
    """Returns what is left of a model without some blocks: the others move up, and config.json says so.

    Raises:
        Failure: `unsupported`, its config has a list that may go by block and that its family does not know; or of its
            blocks with attention none would be left, which transformers has no cache for.
    """
    config = read_config(checkpoint)
    text = config.get_text_config()  # of a wrapper; else the same
    kept = [block for block in range(text.num_hidden_layers) if block not in removed]
    family = families.named(config.model_type)
    attending = inspect(checkpoint).blocks_with_attention
    if attending and attending <= {*removed}:
        what = f"of {len(attending)} blocks with attention none would be left; write fewer, or another method"
        raise Failure("unsupported", f"prune.blocks: {len(removed)}: {what}")
    # Blocks behind the last one predict further tokens, and move up with it.
    further = range(text.to_dict().get(family.next_token_blocks) or 0)
    places = {block: place for place, block in enumerate([*kept, *(text.num_hidden_layers + n for n in further)])}

    def rename(name: str) -> str | None:
        block = block_of(name)
        if block is None:
            return name
        return in_block(name, places[block]) if block in places else None

    try:
        changes = family.without_blocks(text.to_dict(), kept)
    except ValueError as error:
        raise Failure("unsupported", f"prune.method: depth: config.json: {error}; write another method") from None
    for name, value in changes.items():
        setattr(text, name, value)
    return Left(config, rename)
