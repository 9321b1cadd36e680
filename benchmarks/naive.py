"""Structured pruning as one would do it without measuring, beside which trimtab's must be better.

Each function says what to leave of a checkpoint, of the sizes of the pruned one. What was measured serves the norms
alone, which keep their scale in all of them.
"""

from pathlib import Path

import torch

from trimtab.components.pruning.structured import depth, width
from trimtab.components.pruning.structured.writing import Left
from trimtab.model.facts import ModelFacts, inspect
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure.measurements import Measurements


def last_blocks(source: Path, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> Left:
    """Keeps the first blocks."""
    return depth.without(source, range(sizes.layers, inspect(source).layers))


def random_blocks(source: Path, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> Left:
    """Removes blocks by lot."""
    return depth.without(source, torch.randperm(inspect(source).layers, generator=draw)[sizes.layers :].tolist())


def magnitude_width(source: Path, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> Left:
    """Keeps the neurons, KV groups and channels with the largest weights, by the sum of their squares."""
    facts, export = inspect(source), Export(source)
    neurons, groups = [], []
    channels = _squares(export.tensor("model.embed_tokens.weight"), 0)
    for block in range(facts.layers):

        def squares(layer: str, dim: int, block: int = block) -> torch.Tensor:
            return _squares(export.tensor(f"model.layers.{block}.{layer}_proj.weight"), dim)

        ahead = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        channels += sum(squares(layer, 0) for layer in ahead)
        channels += squares("self_attn.o", 1) + squares("mlp.down", 1)
        size = squares("mlp.down", 0) + squares("mlp.gate", 1) + squares("mlp.up", 1)
        neurons.append(width.strongest(size, sizes.intermediate_size))
        parts = [squares("self_attn.o", 0), *(squares(layer, 1) for layer in ahead[:3])]
        size = sum(width.group_importance(part, facts.kv_heads) for part in parts)
        groups.append(width.strongest(size, sizes.kv_heads))
    kept = width.Kept(neurons, groups, width.strongest(channels, sizes.hidden_size))
    return width.keeping(source, sizes, kept, measured)


def random_width(source: Path, sizes: ModelFacts, measured: Measurements, draw: torch.Generator) -> Left:
    """Keeps neurons, KV groups and channels by lot."""

    def some(have: int, keep: int) -> torch.Tensor:
        return width.strongest(torch.rand(have, generator=draw), keep)

    facts = inspect(source)
    kept = width.Kept(
        neurons=[some(facts.intermediate_size, sizes.intermediate_size) for _ in range(facts.layers)],
        groups=[some(facts.kv_heads, sizes.kv_heads) for _ in range(facts.layers)],
        channels=some(facts.hidden_size, sizes.hidden_size),
    )
    return width.keeping(source, sizes, kept, measured)


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.float().square().sum(dim)
