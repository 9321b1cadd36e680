"""How strongly the model's output depends on each layer's: the diagonal of the Fisher information of that output.

It is the mean of g² over gradients g of the log-probability of tokens that the model itself draws (Martens and Grosse
2015, "K-FAC"). One pass forward and backward measures it for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from trimtab.base import progress
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.measure import observe
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.measure.blockwise import Runner

#: Tokens that gradients are averaged over: the mean of squares over these settles far sooner than a Gram matrix.
TOKENS = 4096


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
    try:
        return _by_block(checkpoint, tokens, stage)
    except NotByBlock as reason:
        progress.report(stage, f"loads the whole model, for {reason}")
    model, _ = model_files.load_for_measuring(checkpoint)
    return {name: found.cpu() for name, found in whole(model, tokens.to(model.device), stage).items()}


def whole(model: PreTrainedModel, tokens: torch.Tensor, stage: str) -> dict[str, torch.Tensor]:
    """Returns what `energy` does, of a model in memory, on its device.

    Args:
        model: as loaded; its weights get no gradients.
        tokens: int64 [samples, length], on the model's device.
    """
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    with _backward_energy(observe.linears(model)) as sums:
        for window in progress.track(tokens, stage, "measuring gradients", len(tokens)):
            embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
            _loss(model(inputs_embeds=embedded, use_cache=False).logits, generator).backward()
    return {name: total / tokens.numel() for name, total in sums.items()}


def _by_block(checkpoint: Path, tokens: torch.Tensor, stage: str) -> dict[str, torch.Tensor]:
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
            with _backward_energy(block.layers) as sums:
                for number, hidden in enumerate(read.pop()):
                    hidden = hidden.to(runner.device).requires_grad_(True)
                    runner.calls(block.module, block.number, hidden).backward(gradients[number])
                    gradients[number] = hidden.grad
            found |= {name: (total / tokens.numel()).cpu() for name, total in sums.items()}
        return {name: found[name] for name in observe.linears(runner.model)}


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
def _backward_energy(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
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
