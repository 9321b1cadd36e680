"""What validation asks of whatever serves an artifact, and what an engine refuses to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.base.errors import InputError
from trimtab.runtime.engines.batching import ScoringRequest


class Prediction(NamedTuple):
    """What a model predicts at each place of n windows behind the first token, as plain lists.

    `nll` has the nats of the tokens, [n, length - 1]; `tokens` the likeliest ones of each place, the likeliest first,
    [n, length - 1, count], and `log_probs` theirs in nats.
    """

    nll: list[list[float]]
    tokens: list[list[list[int]]]
    log_probs: list[list[list[float]]]


class Engine(Protocol):
    """Every back end runs one exported artifact and answers in the same units."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The artifact's tokenizer."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights occupy while the engine runs, on all devices together."""

    @property
    def device_bytes(self) -> int:
        """Bytes that the engine holds of its first device's memory, KV cache and graphs included; 0 on a CPU."""

    @property
    def arithmetic(self) -> str:
        """In which numbers products are computed, and on what: for people."""

    def kernels(self) -> dict[str, dict[str, Any]]:
        """Returns for each quantized layer {"kernel": name, "emulated": bool}."""

    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        """Returns for each (context, continuation) its log-probability in nats, and whether it is greedy."""

    def nll(self, windows: torch.Tensor) -> list[float]:
        """Returns for each window, int64 [n, length], the nats of its tokens after the first, summed."""

    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        """Returns what `nll` sums, and the `count` likeliest tokens of each place."""

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> list[list[int]]:
        """Returns for each prompt the tokens that greedy decoding adds, without the end-of-text token.

        `until` has for each prompt the texts that its answer is cut at by whoever reads it: an engine may leave out
        tokens behind the first of them.
        """

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """Returns the tokens a second of all sequences together, once a repeat, prefill excluded."""

    def close(self) -> None:
        """Gives memory and processes back; the engine answers no more."""


def check_requests(requests: list[ScoringRequest], limit: int, name: str = "engine.max_seq_len") -> None:
    """Refuses requests for log-likelihoods that an engine cannot answer whole.

    Raises:
        InputError: a context or continuation is empty, or both together exceed `limit`, which is called `name`.
    """
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            part = "continuation" if context else "context"
            raise InputError(f"request {number}: its {part} is empty; a token is scored on one before it")
        check_length(f"request {number}", len(context) + len(continuation), limit, name)


def check_prompts(prompts: list[list[int]], max_new_tokens: int, limit: int) -> None:
    """Refuses prompts that an engine cannot continue.

    Raises:
        InputError: a prompt is empty, or with its new tokens exceeds `limit`, the engine's max_seq_len.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {number}: is empty; give at least one token")
        check_length(f"prompt {number} with {max_new_tokens} new tokens", len(prompt) + max_new_tokens, limit)


def check_length(what: str, tokens: int, limit: int, name: str = "engine.max_seq_len") -> None:
    """Refuses more tokens than the engine has room for: nothing is ever truncated.

    Raises:
        InputError: there are more.
    """
    if tokens > limit:
        raise InputError(f"{what} has {tokens} tokens, more than {name} {limit}; raise it or cut")
