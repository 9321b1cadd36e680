"""Where an answer may end early: behind a text that its reader stops at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

#: Steps of decoding between two looks at the texts: decoding an answer to text takes longer than a small GPU step.
EVERY = 8
#: Characters that later tokens may still change: those of an unfinished character of UTF-8, or the blank before a
#: mark that some tokenizers remove (" n't").
_UNSETTLED = 4


def has_ended(text: str, until: Sequence[str]) -> bool:
    """Returns whether what is read of an answer is settled: cut at a text to stop at, it stays as it is.

    So there must be room behind the stop for the longest of them to begin before it.
    """
    stops = [stop for stop in until if stop]
    longest = max(map(len, stops), default=0)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return bool(places) and len(text) >= min(places) + longest + _UNSETTLED


class AnswersEnd(StoppingCriteria):
    """Ends a batch of transformers' `generate` when every answer has ended, by its end token or by a stop.

    It ends all at once, so no answer has anything else in it than without this.

    Args:
        tokenizer: what makes texts of tokens.
        prompt_tokens: the length of the batch's padded prompts.
        ends: the tokens that end a text.
        until: of each answer, the texts to stop at.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        ends: Sequence[int],
        until: Sequence[Sequence[str]],
    ):
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._ends, self._until = set(ends), until
        self._open = list(range(len(until)))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Returns for each row of `input_ids` [B, L] whether it has ended: bool [B], all alike."""
        if not (input_ids.shape[1] - self._prompt_tokens) % EVERY:
            written = input_ids[:, self._prompt_tokens :].tolist()
            self._open = [row for row in self._open if not self._has_ended(written[row], self._until[row])]
        return torch.full((len(input_ids),), not self._open, device=input_ids.device)

    def _has_ended(self, answer: list[int], until: Sequence[str]) -> bool:
        if not self._ends.isdisjoint(answer):
            return True
        return has_ended(self._tokenizer.decode(answer, skip_special_tokens=True), until)
