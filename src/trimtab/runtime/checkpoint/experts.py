"""Experts as a checkpoint stores them: a linear layer each, where transformers 5 holds one tensor for all of them.

So whatever finds linear layers in a model, hooks, packed layers, trainings, finds those of experts too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from trimtab.families import Experts


class Expert(nn.Module):
    """One expert: a linear layer each for gate and up, or for up alone, and for down; biases where `biased`."""

    def __init__(self, part: Experts, hidden: int, size: int, biased: bool, dtype: torch.dtype):
        super().__init__()
        for name in filter(None, (part.gate, part.up)):
            self.add_module(name, nn.Linear(hidden, size, biased, device="meta", dtype=dtype))
        self.add_module(part.down, nn.Linear(size, hidden, biased, device="meta", dtype=dtype))


class SeparateExperts(nn.ModuleList):
    """The experts of a block by number, called as transformers' own module is called.

    Args:
        stacked: transformers' module, whose activation is used; its weights are not.
        part: how the checkpoint names an expert's layers.
    """

    def __init__(self, stacked: nn.Module, part: Experts):
        down = stacked.down_proj
        first = stacked.gate_up_proj if part.gate else stacked.up_proj
        # One tensor holds [experts, out, in], or [experts, in, out] where its module multiplies from the left.
        is_left = first.shape[2] != down.shape[1]
        hidden, size = (down.shape[2], down.shape[1]) if is_left else (down.shape[1], down.shape[2])
        biased = hasattr(stacked, "down_proj_bias")
        super().__init__(Expert(part, hidden, size, biased, down.dtype) for _ in range(down.shape[0]))
        self._part, self._stacked = part, [stacked]  # in a list, so that it is no module of this one
        self._interleaved = not getattr(stacked, "is_concatenated", True)
        #: Experts that are run on every token too, so that their inputs can be measured; nothing of it is used.
        self.run_on_all: Collection[int] = ()
        #: Whether experts without tokens are run on none, so that each has a gradient, if of zeros: processes that
        #: train parts of one model deal out all its gradients together.
        self.runs_without_tokens = False

    @property
    def first_layer(self) -> str:
        """The first, by name, of the layers that read an expert's input."""
        return min(filter(None, (self._part.gate, self._part.up)))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor | None = None, weights: torch.Tensor | None = None):
        """Returns for each token, [tokens, hidden], the weighted sum of its experts' outputs.

        Args:
            chosen: the experts of each token, int64 [tokens, k]; with None, as Llama 4 calls it, `hidden` holds each
                token once for each expert, [experts x tokens, hidden], zeros where it is not given to that one, and
                the outputs are returned so.
            weights: of these experts, [tokens, k].
        """
        if chosen is None:
            return self._given(hidden)
        for number in self.run_on_all:
            self.run(number, hidden)
        total = torch.zeros_like(hidden, dtype=torch.result_type(hidden, weights))
        for number in range(len(self)) if self.runs_without_tokens else chosen.unique().tolist():
            if number < len(self):
                token, place = torch.where(chosen == number)
                total.index_add_(0, token, (self.run(number, hidden[token]) * weights[token, place, None]).to(total))
        return total.to(hidden.dtype)

    def _given(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for number, tokens in enumerate(hidden.chunk(len(self))):
            here = tokens.any(dim=-1).nonzero()[:, 0]
            if number in self.run_on_all:
                self.run(number, tokens)
            output = torch.zeros_like(tokens)
            runs = len(here) or self.runs_without_tokens
            outputs.append(output.index_copy(0, here, self.run(number, tokens[here])) if runs else output)
        return torch.cat(outputs)

    def run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns one expert's output for tokens, [n, hidden]."""
        expert, part, stacked = self[number], self._part, self._stacked[0]
        up = getattr(expert, part.up)(hidden)
        if part.gate:
            gate = getattr(expert, part.gate)(hidden)
            middle = self._gated(stacked, gate, up)
        else:
            middle = stacked.act_fn(up)
        return getattr(expert, part.down)(middle)

    def _gated(self, stacked: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if not hasattr(stacked, "_apply_gate"):
            return stacked.act_fn(gate) * up
        both = torch.stack([gate, up], dim=-1).flatten(-2) if self._interleaved else torch.cat([gate, up], dim=-1)
        return stacked._apply_gate(both)


def separate(blocks: nn.ModuleList, part: Experts) -> None:
    """Puts separate experts in the place of transformers' in every block that has some."""
    for block in blocks:
        module = getattr(block, part.module, None)
        if module is not None and hasattr(module, part.experts):
            setattr(module, part.experts, SeparateExperts(getattr(module, part.experts), part))


def mixtures(model: nn.Module, prefix: str = "") -> dict[str, SeparateExperts]:
    """Returns the mixtures of experts of a model, or of a part of one that stands at `prefix`, by their whole names."""
    named = model.named_modules(prefix=prefix)
    return {name: module for name, module in named if isinstance(module, SeparateExperts)}
