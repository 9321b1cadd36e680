"""How strongly the model's output depends on each layer's: the diagonal of the Fisher information of that output.

It is the mean of g² over gradients g of the log-probability of tokens that the model itself draws (Martens and Grosse
2015, "K-FAC"). One pass forward and backward measures it for all layers. Beside the means, some tokens can be kept,
with the inputs that gave these gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from trimtab.base import progress
from trimtab.families import fusion
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.measure import observe
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.measure.blockwise import Runner

#: Tokens that gradients are averaged over: the mean of squares over these settles far sooner than a Gram matrix.
TOKENS = 4096


#: Of these, tokens that are kept of each layer: a gigabyte of 8 billion parameters.
KEPT = 256


class Sample(NamedTuple):
    """What some tokens gave a layer and asked of it: inputs [n, in_features], gradients of its output
    [n, out_features], and how many of all tokens each stands for, as a share."""

    inputs: torch.Tensor
    gradients: torch.Tensor
    share: float


#: Watches layers, of a model type, while the body runs backward, and gives what it has found of each behind it.
Watch = Callable[[Mapping[str, nn.Linear], str], AbstractContextManager[dict[str, Any]]]


def enough(tokens: torch.Tensor) -> torch.Tensor:
    """Returns as many of the windows, [samples, length], as have `TOKENS` tokens, and at least one."""
    return tokens[: max(1, TOKENS // tokens.shape[1])]


def energy(checkpoint: Path, tokens: torch.Tensor, stage: str) -> dict[str, torch.Tensor]:
    """Returns for every linear layer E[g_i²], float32 [out_features], on the CPU.

    The model runs a block at a time, forward and, with the same weights read once more, backward; one that cannot is
    loaded whole.

    Args:
        tokens: int64 [samples, length].
        stage: whose progress it is.
    """
    sums = _measured(checkpoint, tokens, stage, _backward_energy)
    return {name: total / tokens.numel() for name, total in sums.items()}


def samples(checkpoint: Path, tokens: torch.Tensor, stage: str) -> dict[str, Sample]:
    """Returns of every linear layer what evenly drawn tokens gave it, on the CPU; arguments as for `energy`.

    Layers that read one input share its tensor. An expert has some of the tokens that it was given, or none.
    """
    every = max(1, tokens.numel() // KEPT)
    return _measured(checkpoint, tokens, stage, partial(_kept, every=every, share=every / tokens.numel()))


def _measured(checkpoint: Path, tokens: torch.Tensor, stage: str, watch: Watch) -> dict[str, Any]:
    try:
        return _by_block(checkpoint, tokens, stage, watch)
    except NotByBlock as reason:
        progress.report(stage, f"loads the whole model, for {reason}")
    model, _ = model_files.load_for_measuring(checkpoint)
    return {name: _to_cpu(found) for name, found in _whole(model, tokens.to(model.device), stage, watch).items()}


def whole(model: PreTrainedModel, tokens: torch.Tensor, stage: str) -> dict[str, torch.Tensor]:
    """Returns what `energy` does, of a model in memory, on its device.

    Args:
        model: as loaded; its weights get no gradients.
        tokens: int64 [samples, length], on the model's device.
    """
    sums = _whole(model, tokens, stage, _backward_energy)
    return {name: total / tokens.numel() for name, total in sums.items()}


def _whole(model: PreTrainedModel, tokens: torch.Tensor, stage: str, watch: Watch) -> dict[str, Any]:
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    with watch(observe.linears(model), family_of(model).model_type) as found:
        for window in progress.track(tokens, stage, "measuring gradients", len(tokens)):
            embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
            _loss(model(inputs_embeds=embedded, use_cache=False).logits, generator).backward()
    return found


def _by_block(checkpoint: Path, tokens: torch.Tensor, stage: str, watch: Watch) -> dict[str, Any]:
    read: list[list[torch.Tensor]] = []  # what each block reads of each window, in host memory

    def keep(block: Block) -> dict[str, torch.Tensor]:
        read.append([block.hidden(number).to("cpu", copy=True) for number in range(len(tokens))])
        return {}

    title = "measuring gradients"
    with Runner(checkpoint, tokens, stage, f"{title}, forward", windows_at_once=1) as runner:
        with torch.no_grad():
            for _ in runner.run(keep, through=True):
                pass
        gradients, found = _behind(runner), {}
        for block in progress.track(runner.backward(), stage, f"{title}, backward", len(read)):
            with watch(block.layers, block.family.model_type) as here:
                for number, hidden in enumerate(read.pop()):
                    hidden = hidden.to(runner.device).requires_grad_(True)
                    runner.calls(block.module, block.number, hidden).backward(gradients[number])
                    gradients[number] = hidden.grad
            found |= {name: _to_cpu(each) for name, each in here.items()}
        return {name: found[name] for name in observe.linears(runner.model) if name in found}


def _to_cpu(found: torch.Tensor | Sample) -> torch.Tensor | Sample:
    if isinstance(found, Sample):
        return Sample(found.inputs.cpu(), found.gradients.cpu(), found.share)
    return found.cpu()


def _behind(runner: Runner) -> list[torch.Tensor]:
    """The gradients of the hidden states behind the last block, a window each."""
    generator, gradients = torch.Generator(runner.device).manual_seed(0), []
    with runner.weights.outside(head=True):
        for number, windows in enumerate(runner.batches):
            hidden = runner.streams["hidden"][number].detach().requires_grad_(True)
            _loss(runner.calls.head(windows, hidden), generator).backward()
            gradients.append(hidden.grad)
    return gradients


def _loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The negative log-probability of tokens that the model itself draws, summed; of one window, [1, length, vocab]."""
    logits = logits[0].float()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn, reduction="sum")


@contextmanager
def _backward_energy(layers: Mapping[str, nn.Linear], model_type: str) -> Iterator[dict[str, torch.Tensor]]:
    """Sums the squares of the gradients of every layer's output while the body runs backward."""
    energy = {name: torch.zeros(m.out_features, device=m.weight.device) for name, m in layers.items()}

    def watch(name: str, output: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            energy[name] += gradient.flatten(0, -2).float().square().sum(0)

        output.register_hook(add)

    handles = [m.register_forward_hook(lambda _, __, out, n=name: watch(n, out)) for name, m in layers.items()]
    try:
        yield energy
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kept(
    layers: Mapping[str, nn.Linear], model_type: str, every: int, share: float
) -> Iterator[dict[str, Sample]]:
    """Keeps every so many-th row of the inputs of groups and of the gradients of layers' outputs, as they come.

    Not the first: a window's first token has activations like no other's, and would count many times.
    """
    groups = fusion.groups(layers, model_type)
    inputs: dict[str, list[torch.Tensor]] = {group.layers[0]: [] for group in groups}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    found: dict[str, Sample] = {}

    def some(rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().flatten(0, -2)[every // 2 :: every].clone()

    def look(name: str, given: torch.Tensor) -> None:
        if name in inputs and torch.is_grad_enabled():
            inputs[name].append(some(given))

    def watch(name: str, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients[name].append(some(gradient)))

    handles = [m.register_forward_pre_hook(lambda _, args, n=n: look(n, args[0])) for n, m in layers.items()]
    handles += [m.register_forward_hook(lambda _, __, out, n=n: watch(n, out)) for n, m in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for group in groups:
        given = inputs[group.layers[0]]
        given = torch.cat(given) if given else None
        for name in group.layers:
            if given is not None and gradients[name]:
                found[name] = Sample(given, torch.cat(gradients[name]), share)
