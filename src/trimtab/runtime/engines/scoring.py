"""How engines on PyTorch score: from the last hidden states of batches, however these are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from trimtab.base.errors import InputError
from trimtab.families import Logits
from trimtab.recipe import Engine as Settings
from trimtab.runtime.decoder import gpu_memory, head
from trimtab.runtime.engines import batching
from trimtab.runtime.engines.batching import ScoringRequest
from trimtab.runtime.engines.protocol import Prediction, check_length, check_requests
from trimtab.runtime.linear import cpu_products

Batch = TypeVar("Batch")


class Inputs(NamedTuple):
    """What a model reads of a batch, as `batching.Batch` has it; padding on the right needs no mask."""

    tokens: torch.Tensor
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def _whole(batch: batching.Batch) -> Inputs:
    return Inputs(batch.tokens, batch.positions, batch.mask)


class Scoring:
    """The likelihoods of the protocol, for an engine that makes hidden states of batches (`_hidden_of`).

    Attributes:
        settings: `max_seq_len` bounds a sequence, `max_num_tokens` a forward pass.
        device: of the hidden states.
        head: the output head.
    """

    settings: Settings
    device: torch.device
    head: nn.Linear
    #: What becomes of the head's products.
    _behind_head: Logits
    #: Whether requests with the same context may share a row.
    _share_contexts: bool

    def _hidden_of(
        self, batches: Iterable[Batch], read: Callable[[Batch], Inputs]
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yields each batch with its last hidden states, [B, L, hidden_size] on the device; the head has its weights
        until the next one is asked for.

        Args:
            read: what the model reads of a batch.
        """
        raise NotImplementedError

    @property
    def arithmetic(self) -> str:
        if self.device.type == "cpu":
            return cpu_products.describe()
        return f"bfloat16 products on {torch.cuda.get_device_name(self.device)}"

    @torch.inference_mode()
    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        """As the protocol says; nothing is truncated, and requests that share a context share its work where the model
        allows it.

        Raises:
            InputError: a context or continuation is empty, or both together exceed `max_seq_len`.
        """
        check_requests(requests, self.settings.max_seq_len)
        budget = self.settings.max_num_tokens
        sums = torch.zeros(len(requests), dtype=torch.float64)
        misses = torch.zeros(len(requests), dtype=torch.int64)
        groups = batching.batches(batching.rows(requests, self._share_contexts, budget), budget)
        batches = map(batching.to_tensors, groups)  # one at a time, for their masks
        with gpu_memory.part("activations", self.device):
            for batch, hidden in self._hidden_of(batches, _whole):
                places, targets = hidden[batch.rows, batch.columns], batch.targets.to(self.device)
                log_probs, likeliest = head.score(self.head, places, targets, self._behind_head)
                sums.index_add_(0, batch.owners, log_probs.cpu().double())
                misses.index_add_(0, batch.owners, (~likeliest).cpu().long())
        return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))

    @torch.inference_mode()
    def nll(self, windows: torch.Tensor) -> list[float]:
        """As the protocol says.

        Raises:
            InputError: a window exceeds `max_seq_len`, or has fewer than two tokens.
        """
        totals = []
        with gpu_memory.part("activations", self.device):
            for hidden, targets in self._predicting(windows):
                log_probs, _ = head.score(self.head, hidden.flatten(0, 1), targets.flatten(), self._behind_head)
                totals += (-log_probs).double().view(len(targets), -1).sum(1).tolist()
        return totals

    @torch.inference_mode()
    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        """As the protocol says.

        Raises:
            InputError: as `nll`.
        """
        found = Prediction([], [], [])
        with gpu_memory.part("activations", self.device):
            for hidden, targets in self._predicting(windows):
                told = head.predict(self.head, hidden.flatten(0, 1), targets.flatten(), count, self._behind_head)
                log_probs, tokens, best = (each.unflatten(0, (len(targets), -1)) for each in told)
                for part, values in zip(found, (-log_probs, tokens, best), strict=True):
                    part += values.tolist()
        return found

    def _predicting(self, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the hidden states that predict the tokens of windows behind their first, and these tokens."""
        length = windows.shape[1]
        check_length("a window", length, self.settings.max_seq_len)
        if length < 2:
            raise InputError(f"a window of {length} tokens predicts nothing; give at least 2")
        batches = windows.split(max(1, self.settings.max_num_tokens // length))
        for batch, hidden in self._hidden_of(batches, lambda batch: Inputs(batch[:, :-1])):
            yield hidden, batch[:, 1:].to(self.device)
