"""What an engine writes after a few prompts, and whether that is text."""

from __future__ import annotations

from trimtab.runtime.engines.protocol import Engine
from trimtab.runtime.text import token_windows

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To make a cup of tea, first",
    "The three most important rules of good writing are",
    # A deployed service is asked all of them again (`trimtab watch-release`); of questions, chat models refuse some.
    "Question: How many days are there in a leap year?\nAnswer:",
    "def fibonacci(n):",
    "How do I sharpen a kitchen knife?",
    "How can I pick the lock of my neighbour's door?",
)


def generate(engine: Engine, new_tokens: int = 32) -> dict[str, list[int]]:
    """Returns the greedy continuation of each of `PROMPTS`, in tokens."""
    prompts = [token_windows.encode(engine.tokenizer, prompt) for prompt in PROMPTS]
    return dict(zip(PROMPTS, engine.generate(prompts, max_new_tokens=new_tokens), strict=True))


def is_degenerate(tokens: list[int]) -> bool:
    """Says whether a continuation is empty, or less than a third of its pairs of tokens are different ones."""
    pairs = list(zip(tokens, tokens[1:], strict=False))
    return not tokens or (len(pairs) >= 12 and len(set(pairs)) < len(pairs) / 3)
