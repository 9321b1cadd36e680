"""Width pruning: FFN neurons, KV groups and hidden channels, those that carry least of the calibration text.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron,
arXiv 2407.14679), which scores by activations alone; here by their mean squares, which calibration has. Two variants
were tried on SmolLM2-135M, of perplexity 22.0. To multiply by the squares of the weights behind, and so to score what
is added to the residual stream, is worse: 48.0 without a KV group of three, 33.6 by activations. Hidden channels are
scored ahead of the norms' weights, which is better than behind them: 41.5 without 64 of 576, and 44.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from trimtab import families
from trimtab.components.pruning.structured import Left, read_config
from trimtab.families import Family
from trimtab.model import ModelFacts, inspect
from trimtab.runtime.checkpoint import Export


def group_importance(second_moment: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the importance of each KV group: the sum over the channels of its attention heads.

    Args:
        second_moment: [heads * head_dim], of the input of o_proj.

    Returns:
        [groups].
    """
    return second_moment.reshape(groups, -1).sum(dim=1)


def channel_energy(norm: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Returns the mean square of each hidden channel ahead of an RMS norm's weights; over the channels they sum to n.

    Args:
        norm: [n], its weights.
        second_moment: [n], of its output.

    Returns:
        float32 [n]; 0 where a weight of 0 hides what its channel carries.
    """
    square = norm.float().square()
    return torch.where(square > 0, second_moment / square, 0.0)


def norm_scale(energy: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Returns the factor on an RMS norm's weights for the kept channels that keeps the scale of its output.

    The norm divides by the root of the mean square over all channels, so without those that carry little its output
    would shrink. Where the removed ones carry nothing, nothing changes.

    Args:
        energy: [n], of `channel_energy`.
        kept: indices of channels.

    Returns:
        A scalar.
    """
    left = len(energy) - energy.sum() + energy[kept].sum()
    return (left.clamp(min=0) / len(kept)).sqrt()


def strongest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of the `count` largest values in ascending order; the first among equals.

    Args:
        importance: [n], at least `count`.
    """
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def spread(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the indices of all rows of the given groups, where each group has `size` rows in a row."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


class Kept(NamedTuple):
    """What a narrowed model keeps, as ascending indices: the neurons and KV groups of each block, hidden channels."""

    neurons: list[torch.Tensor]
    groups: list[torch.Tensor]
    channels: torch.Tensor


def choose(checkpoint: Path, sizes: ModelFacts, measured: Mapping[str, torch.Tensor]) -> Kept:
    """Returns the most important neurons, KV groups and channels, as many as the narrowed model has.

    Args:
        checkpoint: of a family whose `width` says that its blocks can be narrowed.
        sizes: the facts of the narrowed model.
        measured: `<layer>.second_moment`, float32 [in_features], of the linear layers.
    """
    facts = inspect(checkpoint)
    family = families.named(facts.model_type)

    def moments(side: str) -> list[torch.Tensor]:
        layer = next(layer.name for layer in family.layers.values() if layer.inputs == side)
        return [measured[f"{family.blocks}.{block}.{layer}.second_moment"] for block in range(facts.layers)]

    heads = [group_importance(moment, facts.kv_heads) for moment in moments("attention")]
    channels = torch.stack(list(_energies(checkpoint, measured).values())).sum(dim=0)
    return Kept(
        neurons=[strongest(moment, sizes.intermediate_size) for moment in moments("ffn")],
        groups=[strongest(importance, sizes.kv_heads) for importance in heads],
        channels=strongest(channels, sizes.hidden_size),
    )


def keeping(checkpoint: Path, sizes: ModelFacts, kept: Kept, measured: Mapping[str, torch.Tensor]) -> Left:
    """Returns what is left of a narrowed model.

    Args:
        checkpoint, sizes, measured: as of `choose`.
        kept: what is left, of the sizes.
    """
    facts, config = inspect(checkpoint), read_config(checkpoint)
    family = families.named(facts.model_type)
    scales: dict[str, torch.Tensor] = {}
    if sizes.hidden_size < facts.hidden_size:
        scales = {name: norm_scale(energy, kept.channels) for name, energy in _energies(checkpoint, measured).items()}
        # nothing is measured behind the last norm: the scale of the one before it stands in
        scales[f"{family.last_norm}.weight"] = list(scales.values())[-1]

    def indices(side: str, block: int) -> torch.Tensor:
        if side in ("hidden", "ffn"):
            return kept.channels if side == "hidden" else kept.neurons[block]
        heads = facts.heads // facts.kv_heads if side == "attention" else 1
        return spread(kept.groups[block], heads * facts.head_dim)

    def narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        if layer := family.layer(module):
            outputs, inputs = (indices(side, family.place(module)[0]) for side in (layer.outputs, layer.inputs))
            return tensor[outputs] if kind == "bias" else tensor[outputs][:, inputs]
        if module in (family.embedding, family.head):
            return tensor[:, kept.channels]
        return (tensor[kept.channels] * scales[name]).to(tensor.dtype) if name in scales else tensor

    config.num_attention_heads, config.num_key_value_heads = sizes.heads, sizes.kv_heads
    config.hidden_size, config.intermediate_size = sizes.hidden_size, sizes.intermediate_size
    config.head_dim = sizes.head_dim  # else hidden_size / heads is taken for it
    return Left(config, narrow=narrow)


def _energies(checkpoint: Path, measured: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The channels' energy at each block's two norms, before attention and after it, by the names of their weights."""
    export, facts = Export(checkpoint), inspect(checkpoint)
    pairs = _behind_norms(families.named(facts.model_type), facts.layers)
    return {norm: channel_energy(export.tensor(norm), measured[f"{layer}.second_moment"]) for norm, layer in pairs}


def _behind_norms(family: Family, blocks: int) -> list[tuple[str, str]]:
    """The weight of each norm in a block, and a layer that reads what it makes."""
    shared = [shared for shared in family.inputs if shared.norm]
    names = [f"{family.blocks}.{block}" for block in range(blocks)]
    return [(f"{block}.{s.norm}.weight", f"{block}.{s.layers[0].name}") for block in names for s in shared]
