"""Width pruning: FFN neurons, KV groups and hidden channels, those that carry least of the calibration text.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron,
arXiv 2407.14679), which scores by activations alone; here by their mean squares, which calibration has. Two variants
were tried on SmolLM2-135M, of perplexity 22.0. To multiply by the squares of the weights behind, and so to score what
is added to the residual stream, is worse: 48.0 without a KV group of three, 33.6 by activations. Hidden channels are
scored ahead of the norms' weights, which is better than behind them: 41.5 without 64 of 576, and 44.6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from trimtab import progress
from trimtab.model import ModelFacts
from trimtab.runtime import observe


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


def choose(model: nn.Module, sizes: ModelFacts, measured: Mapping[str, torch.Tensor]) -> Kept:
    """Returns the most important neurons, KV groups and channels, as many as the narrowed model has.

    Args:
        model: of one of `shapes.WIDTH_MODEL_TYPES`.
        sizes: the facts of the narrowed model.
        measured: `<layer>.second_moment`, float32 [in_features], of the linear layers.
    """
    moment, blocks, have = _moments(model, measured), observe.blocks(model), model.config.num_key_value_heads
    heads = [group_importance(moment(block.self_attn.o_proj), have) for block in blocks]
    channels = torch.stack([energy for block in blocks for energy in _energies(block, moment)]).sum(dim=0)
    return Kept(
        neurons=[strongest(moment(block.mlp.down_proj), sizes.intermediate_size) for block in blocks],
        groups=[strongest(importance, sizes.kv_heads) for importance in heads],
        channels=strongest(channels, sizes.hidden_size),
    )


def narrow(model: nn.Module, sizes: ModelFacts, kept: Kept, measured: Mapping[str, torch.Tensor]) -> None:
    """Narrows a model in place, a block at a time; config and ties of weights stay consistent.

    Args:
        model, sizes, measured: as of `choose`.
        kept: what is left, of the sizes.
    """
    config, moment, blocks = model.config, _moments(model, measured), observe.blocks(model)
    narrower = sizes.hidden_size < config.hidden_size
    parts = zip(blocks, kept.neurons, kept.groups, strict=True)
    for block, neurons, groups in progress.track(parts, "prune", "narrowing blocks", len(blocks)):
        if narrower:
            scales = [norm_scale(energy, kept.channels) for energy in _energies(block, moment)]
            _narrow_hidden(block, kept.channels, *scales)
        if sizes.intermediate_size < config.intermediate_size:
            _narrow_mlp(block.mlp, neurons)
        if sizes.kv_heads < config.num_key_value_heads:
            _narrow_attention(block.self_attn, groups, sizes)
    if narrower:  # nothing is measured behind the last norm: the scale of the one before it stands in
        _narrow_ends(model, kept.channels, scales[-1])
    config.num_attention_heads, config.num_key_value_heads = sizes.heads, sizes.kv_heads
    config.hidden_size, config.intermediate_size = sizes.hidden_size, sizes.intermediate_size
    config.head_dim = sizes.head_dim  # else hidden_size / heads is taken for it


def _moments(model: nn.Module, measured: Mapping[str, torch.Tensor]) -> Callable[[nn.Module], torch.Tensor]:
    names = {module: name for name, module in model.named_modules()}
    return lambda layer: measured[f"{names[layer]}.second_moment"]


def _energies(block: nn.Module, moment: Callable[[nn.Module], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels' energy at the block's two norms, before attention and after it."""
    before = channel_energy(block.input_layernorm.weight.data, moment(block.self_attn.q_proj))
    return before, channel_energy(block.post_attention_layernorm.weight.data, moment(block.mlp.gate_proj))


def _narrow_mlp(mlp: nn.Module, neurons: torch.Tensor) -> None:
    _take_outputs(neurons, mlp.gate_proj, mlp.up_proj)
    _take_inputs(neurons, mlp.down_proj)


def _narrow_attention(attention: nn.Module, groups: torch.Tensor, sizes: ModelFacts) -> None:
    queries = spread(groups, sizes.heads // sizes.kv_heads * sizes.head_dim)
    _take_outputs(spread(groups, sizes.head_dim), attention.k_proj, attention.v_proj)
    _take_outputs(queries, attention.q_proj)
    _take_inputs(queries, attention.o_proj)


def _narrow_hidden(block: nn.Module, channels: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    """`before` and `after` attention: the factors of the block's two norms."""
    attention, mlp = block.self_attn, block.mlp
    _take_inputs(channels, attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    _take_outputs(channels, attention.o_proj, mlp.down_proj)
    _narrow_norm(block.input_layernorm, channels, before)
    _narrow_norm(block.post_attention_layernorm, channels, after)


def _narrow_ends(model: nn.Module, channels: torch.Tensor, scale: torch.Tensor) -> None:
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), model.model.norm
    _narrow_norm(norm, channels, scale)
    embedding.weight.data = embedding.weight.data[:, channels]
    embedding.embedding_dim = head.in_features = len(channels)
    if head.weight is not embedding.weight:
        head.weight.data = head.weight.data[:, channels]


def _narrow_norm(norm: nn.Module, channels: torch.Tensor, scale: torch.Tensor) -> None:
    norm.weight.data = (norm.weight.data[channels] * scale).to(norm.weight.dtype)


def _take_outputs(rows: torch.Tensor, *layers: nn.Linear) -> None:
    for layer in layers:
        layer.weight.data = layer.weight.data[rows]
        layer.out_features = len(rows)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data[rows]


def _take_inputs(columns: torch.Tensor, *layers: nn.Linear) -> None:
    for layer in layers:
        layer.weight.data = layer.weight.data[:, columns]
        layer.in_features = len(columns)
