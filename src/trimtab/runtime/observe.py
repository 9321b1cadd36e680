"""Hooks that measure what flows through a model while it runs on calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the transformer blocks: the module list whose length is the number of hidden layers."""
    wanted = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {wanted} blocks")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers inside the blocks by name: embeddings and the output head are left out."""
    inside = {id(module) for module in blocks(model).modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


class InputStatistics:
    """Running maximum and second moment of one layer's input, a value a channel: float32 [in_features]."""

    def __init__(self, channels: int):
        self.amax = torch.zeros(channels)
        self.square_sum = torch.zeros(channels, dtype=torch.float64)
        self.rows = 0

    def add(self, activations: torch.Tensor) -> None:
        rows = activations.detach().reshape(-1, activations.shape[-1]).float()
        self.amax = torch.maximum(self.amax, rows.abs().amax(0))
        self.square_sum += rows.square().sum(0).double()
        self.rows += len(rows)

    @property
    def second_moment(self) -> torch.Tensor:
        return (self.square_sum / max(self.rows, 1)).float()


class Similarity:
    """Running mean of the cosine between a block's input and output, over tokens."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += cosine.sum().item()
        self.tokens += cosine.numel()

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)


@contextmanager
def observed(model: nn.Module) -> Iterator[tuple[dict[str, InputStatistics], list[Similarity]]]:
    """Measures every linear's input and every block's influence while the body runs the model."""
    inputs = {name: InputStatistics(layer.in_features) for name, layer in linears(model).items()}
    similarities = [Similarity() for _ in blocks(model)]
    handles = []
    for name, layer in linears(model).items():
        handles.append(layer.register_forward_pre_hook(lambda _, args, s=inputs[name]: s.add(args[0])))
    for block, similarity in zip(blocks(model), similarities, strict=True):

        def compare(_, args, kwargs, output, similarity=similarity):
            before = args[0] if args else kwargs["hidden_states"]
            similarity.add(before, output[0] if isinstance(output, tuple) else output)

        handles.append(block.register_forward_hook(compare, with_kwargs=True))
    try:
        yield inputs, similarities
    finally:
        for handle in handles:
            handle.remove()
