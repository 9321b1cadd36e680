"""Structured pruning as one would do it without measuring, beside which trimtab's must be better.

Each function changes a model in place to the sizes of the pruned one. What was measured serves the norms alone, which
keep their scale in all of them.
"""

import torch
from torch import nn

from trimtab.components.pruning import depth, width
from trimtab.model import ModelFacts
from trimtab.runtime import observe
from trimtab.runtime.measurements import Measurements


def last_blocks(model: nn.Module, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> None:
    """Keeps the first blocks."""
    depth.remove_blocks(model, list(range(sizes.layers, model.config.num_hidden_layers)))


def random_blocks(model: nn.Module, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> None:
    """Removes blocks by lot."""
    have = model.config.num_hidden_layers
    depth.remove_blocks(model, torch.randperm(have, generator=draw)[sizes.layers :].tolist())


def magnitude_width(model: nn.Module, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> None:
    """Keeps the neurons, KV groups and channels with the largest weights, by the sum of their squares."""
    neurons, groups = [], []
    channels = _squares(model.get_input_embeddings().weight, 0)
    for block in observe.blocks(model):
        mlp, attention = block.mlp, block.self_attn
        ahead = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        channels += sum(_squares(layer.weight, 0) for layer in ahead)
        channels += sum(_squares(layer.weight, 1) for layer in (attention.o_proj, mlp.down_proj))
        size = _squares(mlp.down_proj.weight, 0)
        size += _squares(mlp.gate_proj.weight, 1) + _squares(mlp.up_proj.weight, 1)
        neurons.append(width.strongest(size, sizes.intermediate_size))
        parts = [_squares(attention.o_proj.weight, 0), *(_squares(layer.weight, 1) for layer in ahead[:3])]
        have = model.config.num_key_value_heads
        size = sum(width.group_importance(part, have) for part in parts)
        groups.append(width.strongest(size, sizes.kv_heads))
    kept = width.Kept(neurons, groups, width.strongest(channels, sizes.hidden_size))
    width.narrow(model, sizes, kept, measured)


def random_width(model: nn.Module, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> None:
    """Keeps neurons, KV groups and channels by lot."""

    def some(have: int, keep: int) -> torch.Tensor:
        return width.strongest(torch.rand(have, generator=draw), keep)

    config = model.config
    blocks = range(config.num_hidden_layers)
    kept = width.Kept(
        neurons=[some(config.intermediate_size, sizes.intermediate_size) for _ in blocks],
        groups=[some(config.num_key_value_heads, sizes.kv_heads) for _ in blocks],
        channels=some(config.hidden_size, sizes.hidden_size),
    )
    width.narrow(model, sizes, kept, measured)


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.data.float().square().sum(dim)
