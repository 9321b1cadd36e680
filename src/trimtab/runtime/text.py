"""Text as windows of tokens, for calibration, distillation and perplexity."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InputError


def read_text(source: str, builtin: tuple[str, str]) -> str:
    """Returns the text of a .txt or .jsonl file (the field "text" of each line), or trimtab's own.

    Args:
        source: a path, or "builtin".
        builtin: the package and file name of trimtab's own text.

    Raises:
        InputError: the file does not exist, is empty, or a line of it has no "text".
    """
    if source == "builtin":
        package, name = builtin
        return resources.files(package).joinpath(name).read_text(encoding="utf-8")
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"text: '{source}' is not a file; write 'builtin' or the path of a .txt or .jsonl file"
        )
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        try:
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        except (KeyError, TypeError, json.JSONDecodeError):
            raise InputError(
                f"text: each line of '{source}' must be a JSON object with a field \"text\""
            ) from None
    if not text.strip():
        raise InputError(f"text: '{source}' is empty")
    return text


CALIBRATION_TEXT = ("trimtab.runtime", "calibration.txt")


def windows(tokenizer: Any, text: str, length: int, count: int, seed: int | None = None) -> torch.Tensor:
    """Cuts the text into windows of `length` tokens and returns `count` of them, int64 [count, length].

    The windows do not overlap. With a seed they are drawn at random, without one they are the first.

    Raises:
        InputError: the text has too few tokens.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    available = len(tokens) // length
    if available < count:
        raise InputError(
            f"text: {len(tokens):,} tokens give {available} windows of {length}, {count} are asked for; "
            f"give more text, fewer samples or a shorter length"
        )
    cut = tokens[: available * length].reshape(available, length)
    if seed is None:
        return cut[:count]
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return cut[order[:count]]


def shared_sequences(first: str, second: str, words: int = 13) -> list[str]:
    """Returns the sequences of `words` words that both texts contain: contamination, by GPT-3's measure.

    Source: Brown et al. 2020, appendix C (13-gram overlap of lower-cased words without punctuation).
    """

    def grams(text: str) -> set[str]:
        tokens = re.findall(r"[a-z0-9']+", text.lower())
        return {" ".join(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}

    return sorted(grams(first) & grams(second))
