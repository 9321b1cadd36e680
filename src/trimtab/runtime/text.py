"""Text as tokens, and as windows of them: the same for what is calibrated on, trained on, judged and served.

A tokenizer says itself which tokens stand before a text: Llama's, Mistral's and Gemma's write BOS there, SmolLM's and
Qwen's nothing. A model that was trained with BOS answers worse without it, Gemma's ruinously, and a server always gives
it; so every window and every prompt begins as the tokenizer begins a text.
"""

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


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Returns the tokens that a model reads for a text.

    Args:
        special: whether the tokenizer adds what it adds to a text, BOS say. It adds nothing to a text that begins
            with BOS already, as what a chat template wrote may. False for a part of a text, and for a dialogue, whose
            template writes the special tokens itself.
    """
    written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=special and not written).input_ids


def prefix(tokenizer: Any) -> list[int]:
    """Returns the tokens that the tokenizer writes before every text: [BOS], or none."""
    some = "a"
    whole, bare = encode(tokenizer, some), encode(tokenizer, some, special=False)
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def begin(tokenizer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows of tokens [n, L] as texts begin: with the tokenizer's prefix of P tokens, [n, P + L]."""
    return torch.cat([torch.tensor(prefix(tokenizer), dtype=rows.dtype).expand(len(rows), -1), rows], dim=1)


def windows(
    tokenizer: Any, text: str, length: int, count: int, seed: int | None = None, field: str = "text"
) -> torch.Tensor:
    """Cuts the text into windows of `length` tokens and returns `count` of them, int64 [count, length].

    Each begins as the tokenizer begins a text, with BOS where it writes one. No token of the text is in two of them.
    With a seed they are drawn at random, without one they are the first.

    Raises:
        InputError: the text has too few tokens; begins with `field`.
    """
    tokens = torch.tensor(encode(tokenizer, text, special=False), dtype=torch.int64)
    return begin(tokenizer, cut(tokens, length - len(prefix(tokenizer)), count, seed, field))


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
