"""Text as windows of tokens, for calibration, distillation and perplexity."""

from __future__ import annotations

import re
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.runtime import documents

#: What stands between two documents.
SEPARATOR = "\n\n"
CALIBRATION_TEXT = ("trimtab.runtime", "calibration.txt")


def read_text(source: str, builtin: tuple[str, str], tokenizer: Any = None, field: str = "text") -> str:
    """Returns the documents of a file, or trimtab's own text, as one text; see `documents.read`."""
    return SEPARATOR.join(documents.read(source, builtin, tokenizer, field))


def windows(tokenizer: Any, text: str, length: int, count: int, seed: int | None = None) -> torch.Tensor:
    """Cuts the text into windows of `length` tokens and returns `count` of them, int64 [count, length].

    The windows do not overlap. With a seed they are drawn at random, without one they are the first.

    Raises:
        InputError: the text has too few tokens.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    return cut(tokens, length, count, seed)


def cut(
    tokens: torch.Tensor, length: int, count: int, seed: int | None = None, field: str = "text"
) -> torch.Tensor:
    """Cuts `tokens` [any] into windows and returns `count` of them, [count, length], chosen as `windows` does.

    What is cut with the same numbers and seed is cut alike, so a row of labels of the tokens stays with them.

    Raises:
        InputError: too few tokens; begins with `field`.
    """
    available = len(tokens) // length
    if available < count:
        have = f"{len(tokens):,} token{'s give' if len(tokens) != 1 else ' gives'}"
        raise InputError(
            f"{field}: {have} {available} windows of {length}, {count} are needed; "
            f"give more text, fewer samples or a shorter length"
        )
    chosen = tokens[: available * length].reshape(available, length)
    if seed is None:
        return chosen[:count]
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return chosen[order[:count]]


def shared_sequences(first: str, second: str, words: int = 13) -> list[str]:
    """Returns the sequences of `words` words that both texts contain: contamination, by GPT-3's measure.

    Source: Brown et al. 2020, appendix C (13-gram overlap of lower-cased words without punctuation).
    """

    def grams(text: str) -> set[str]:
        tokens = re.findall(r"[a-z0-9']+", text.lower())
        return {" ".join(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}

    return sorted(grams(first) & grams(second))
