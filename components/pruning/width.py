"""Width pruning: FFN neurons, KV groups and hidden channels, those that carry least of the calibration text.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron,
arXiv 2407.14679): importance is estimated from activations alone. There a head or neuron is scored by the size of its
activation; here the mean square of what it adds to the residual stream, which also counts the weights behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trimtab import progress
from trimtab.model import ModelFacts
from trimtab.runtime import observe


def neuron_importance(second_moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the mean square that each input channel of a layer adds to its output, summed over the output.

    Args:
        second_moment: [in_features], mean square of each input channel.
        weight: [out_features, in_features].

    Returns:
        float32 [in_features].
    """
    return second_moment * weight.float().square().sum(dim=0)


def group_importance(second_moment: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the importance of each KV group: the sum over the channels of its attention heads.

    Args:
        second_moment: [heads * head_dim], of the input of o_proj.
        weight: [hidden_size, heads * head_dim], of o_proj.

    Returns:
        float32 [groups].
    """
    return neuron_importance(second_moment, weight).reshape(groups, -1).sum(dim=1)


def channel_importance(second_moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the importance of each hidden channel: its mean square behind the norms, summed over them.

    Args:
        second_moments: [hidden_size] each.
    """
    return torch.stack(list(second_moments)).sum(dim=0)


def norm_scale(norm: torch.Tensor, second_moment: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Returns the factor on an RMS norm's weights for the kept channels that keeps the scale of its output.

    The norm divides by the root of the mean square over all channels, so without those that carry little its output
    would shrink. Ahead of its weights, the squares of a token sum to the number of channels, and what the removed ones
    had of that sum is measured. Where they had nothing, nothing changes.

    Args:
        norm: [hidden_size], its weights.
        second_moment: [hidden_size], of its output.
        kept: indices of channels.

    Returns:
        A float32 scalar.
    """
    square = norm.float().square()
    energy = torch.where(square > 0, second_moment / square, 0.0)  # a weight of 0 hides what its channel carries
    left = len(norm) - energy.sum() + energy[kept].sum()
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


def prune(model: nn.Module, sizes: ModelFacts, measured: Mapping[str, torch.Tensor]) -> None:
    """Narrows a model in place; config and ties of weights stay consistent.

    Args:
        model: of one of `shapes.WIDTH_MODEL_TYPES`.
        sizes: the facts of the narrowed model.
        measured: `<layer>.second_moment`, float32 [in_features], of the linear layers.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = observe.blocks(model)

    def moment(layer: nn.Linear) -> torch.Tensor:
        return measured[f"{names[layer]}.second_moment"]

    behind = [(moment(block.self_attn.q_proj), moment(block.mlp.gate_proj)) for block in blocks]
    channels = strongest(channel_importance([m for pair in behind for m in pair]), sizes.hidden_size)
    narrower = sizes.hidden_size < model.config.hidden_size
    pairs = zip(blocks, behind, strict=True)
    # Nothing is measured behind the last norm: the one before it stands in.
    last = norm_scale(blocks[-1].post_attention_layernorm.weight.data, behind[-1][1], channels)
    for block, moments in progress.track(pairs, "prune", "narrowing blocks", len(blocks)):
        _narrow_mlp(block.mlp, sizes, moment(block.mlp.down_proj))
        _narrow_attention(block.self_attn, sizes, moment(block.self_attn.o_proj))
        if narrower:
            _narrow_hidden(block, channels, *moments)
    if narrower:
        _narrow_ends(model, channels, last)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(model.config, name, getattr(sizes, _FACTS.get(name, name)))
    model.config.head_dim = sizes.head_dim  # else hidden_size / heads is taken for it


#: Names of the config that are others in the facts.
_FACTS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads"}


def _narrow_mlp(mlp: nn.Module, sizes: ModelFacts, moment: torch.Tensor) -> None:
    if sizes.intermediate_size == mlp.down_proj.in_features:
        return
    neurons = strongest(neuron_importance(moment, mlp.down_proj.weight), sizes.intermediate_size)
    _take_outputs(neurons, mlp.gate_proj, mlp.up_proj)
    _take_inputs(neurons, mlp.down_proj)


def _narrow_attention(attention: nn.Module, sizes: ModelFacts, moment: torch.Tensor) -> None:
    groups = attention.k_proj.out_features // sizes.head_dim
    if sizes.kv_heads == groups:
        return
    heads = strongest(group_importance(moment, attention.o_proj.weight, groups), sizes.kv_heads)
    queries = spread(heads, attention.q_proj.out_features // groups)
    _take_outputs(spread(heads, sizes.head_dim), attention.k_proj, attention.v_proj)
    _take_outputs(queries, attention.q_proj)
    _take_inputs(queries, attention.o_proj)


def _narrow_hidden(block: nn.Module, channels: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    """`before` and `after` attention: the second moments behind the block's two norms."""
    attention, mlp = block.self_attn, block.mlp
    _take_inputs(channels, attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    _take_outputs(channels, attention.o_proj, mlp.down_proj)
    for norm, moment in ((block.input_layernorm, before), (block.post_attention_layernorm, after)):
        _narrow_norm(norm, channels, norm_scale(norm.weight.data, moment, channels))


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
