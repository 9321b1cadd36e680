"""How strongly the model's output depends on each layer's: the diagonal of the Fisher information of that output.

It is the mean of g² over gradients g of the log-probability of tokens that the model itself draws (Martens and Grosse
2015, "K-FAC"). One pass forward and backward measures it for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.base import progress
from trimtab.runtime.measure import observe

#: Tokens that gradients are averaged over: the mean of squares over these settles far sooner than a Gram matrix.
TOKENS = 4096


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
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    with _backward_energy(model) as sums:
        for window in progress.track(tokens, stage, "measuring gradients", len(tokens)):
            embedded = model.get_input_embeddings()(window[None]).requires_grad_(True)
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: total / tokens.numel() for name, total in sums.items()}


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
