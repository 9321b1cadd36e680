"""Decode speed of an engine that only answers whole requests: the time of more tokens, less that of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def speeds(
    write: Callable[[list[list[int]], int], Any],
    vocabulary: int,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> list[float]:
    """Returns the tokens a second of all sequences together, once a repeat; one untimed repeat comes first.

    Args:
        write: answers prompts with so many tokens each, whatever they are.
        vocabulary: tokens of the prompts are drawn below it.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).tolist()

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        write(prompts, tokens)
        return time.perf_counter() - started

    spans = [seconds(1 + new_tokens) - seconds(1) for _ in range(repeats + 1)][1:]
    return [batch_size * new_tokens / max(span, 1e-9) for span in spans]
