"""How strongly the model's output depends on each layer's: the diagonal of the Fisher information of that output.

It is the mean of g² over gradients g of the log-probability of tokens that the model itself draws (Martens and Grosse
2015, "K-FAC"). One pass forward and backward measures it for all layers. Beside the means, some tokens can be kept,
with the inputs that gave these gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.base import progress
from trimtab.runtime.measure import observe

#: Tokens that gradients are averaged over: the mean of squares over these settles far sooner than a Gram matrix.
TOKENS = 4096


#: Of these, tokens that are kept of each layer: 8B parameters' are a gigabyte.
KEPT = 256


#: Name -> what was kept of each window.
Kept = dict[str, list[torch.Tensor]]


class Sample(NamedTuple):
    """What some tokens gave a layer and asked of it: inputs [n, in_features], gradients of its output
    [n, out_features], and how many of all tokens each stands for, as a share."""

    inputs: torch.Tensor
    gradients: torch.Tensor
    share: float


def enough(tokens: torch.Tensor) -> torch.Tensor:
    """Returns as many of the windows, [samples, length], as have `TOKENS` tokens, and at least one."""
    return tokens[: max(1, TOKENS // tokens.shape[1])]


def energy(model: nn.Module, tokens: torch.Tensor, stage: str) -> dict[str, torch.Tensor]:
    """Returns for every linear layer E[g_i²], float32 [out_features].

    Args:
        model: as loaded; its weights get no gradients.
        tokens: int64 [samples, length], on the model's device.
        stage: whose progress it is.
    """
    with _backward_energy(model) as sums:
        _backward(model, tokens, stage)
    return {name: total / tokens.numel() for name, total in sums.items()}


def samples(model: nn.Module, tokens: torch.Tensor, stage: str) -> dict[str, Sample]:
    """Returns of every linear layer what evenly drawn tokens gave it; arguments as for `energy`.

    Layers that read one input share its tensor. An expert has some of the tokens that it was given, or none.
    """
    every = max(1, tokens.numel() // KEPT)
    with _kept(model, every) as (inputs, gradients):
        _backward(model, tokens, stage)
    found = {}
    for group in observe.linear_groups(model):
        given = torch.cat(inputs[group.layers[0]]) if inputs[group.layers[0]] else None
        for name in group.layers:
            if given is not None and gradients[name]:
                found[name] = Sample(given, torch.cat(gradients[name]), every / tokens.numel())
    return found


def _backward(model: nn.Module, tokens: torch.Tensor, stage: str) -> None:
    """Runs forward and backward from the log-probability of tokens that the model draws itself."""
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    for window in progress.track(tokens, stage, "measuring gradients", len(tokens)):
        embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, drawn, reduction="sum").backward()


@contextmanager
def _backward_energy(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Sums the squares of the gradients of every linear layer's output while the body runs backward."""
    energy = {n: torch.zeros(m.out_features, device=m.weight.device) for n, m in observe.linears(model).items()}

    def watch(name: str, output: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            energy[name] += gradient.flatten(0, -2).float().square().sum(0)

        output.register_hook(add)

    layers = observe.linears(model).items()
    handles = [layer.register_forward_hook(lambda _, __, out, n=name: watch(n, out)) for name, layer in layers]
    try:
        yield energy
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kept(model: nn.Module, every: int) -> Iterator[tuple[Kept, Kept]]:
    """Keeps every so many-th row of the inputs of groups and of the gradients of layers' outputs, as they come.

    Not the first: a window's first token has activations like no other's, and would count many times.
    """
    layers = observe.linears(model)
    firsts = {group.layers[0] for group in observe.linear_groups(model)}
    inputs: Kept = {name: [] for name in firsts}
    gradients: Kept = {name: [] for name in layers}

    def some(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().flatten(0, -2)[every // 2 :: every].clone()

    def look(name: str, given: torch.Tensor) -> None:
        if name in inputs:
            inputs[name].append(some(given))

    def watch(name: str, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradients[name].append(some(gradient)))

    handles = []
    for name, layer in layers.items():  # inputs before another hook rounds them
        handles.append(layer.register_forward_pre_hook(lambda _, args, n=name: look(n, args[0]), prepend=True))
        handles.append(layer.register_forward_hook(lambda _, args, out, n=name: watch(n, out)))
    try:
        yield inputs, gradients
    finally:
        for handle in handles:
            handle.remove()
