"""Depth pruning: whole transformer blocks, those that change their input least."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.runtime import observe


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


def remove_blocks(model: nn.Module, removed: list[int]) -> None:
    """Removes the blocks in place; config, cache indices and generation stay consistent."""
    blocks = observe.blocks(model)
    kept = [index for index in range(len(blocks)) if index not in removed]
    remaining = [blocks[index] for index in kept]
    while len(blocks):
        del blocks[-1]
    blocks.extend(remaining)
    for position, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the KV cache keeps one entry an index
                module.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
