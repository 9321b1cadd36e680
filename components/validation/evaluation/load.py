"""What an engine has to do while its speed is measured: as many sequences at a time as it is planned for, as long as
they are there.

An engine is planned for a batch at its full length, or for the long requests of a workload. In the middle of its answer
a request has about half of that behind it, which is what attention reads for the next token: so weights and KV cache
weigh in a step as they will when the artifact serves. At a batch of 8 and 80 tokens a step reads next to nothing but
weights: there an 8 bit KV cache on an A100 gains 0.2 % in bytes, and 35 % at the batch and lengths it is made for.
"""

from __future__ import annotations

from typing import NamedTuple

from trimtab.recipe import Engine

#: Tokens that are written on a GPU, long enough for the clock; and the longest context that is written behind.
NEW_TOKENS = 64
LONGEST_PROMPT = 2048
#: The shortest prompt that says anything of a step.
LEAST_PROMPT = 32


class Load(NamedTuple):
    """Sequences at a time, and tokens of each before and while it is measured."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


def load_of(engine: Engine, on_gpu: bool, short: tuple[int, int]) -> Load:
    """Returns what an engine's speed is measured at.

    A CPU spends its time on products, and reading long prompts would take it longer than the measurement: there prompt
    and answer have the lengths `short`, of tokens. The torch engine reads all prompts of a batch in one step, so there
    they are as short as its step is.
    """
    batch = engine.max_batch_size
    if not on_gpu:
        return Load(batch, *short)
    held = min((engine.kv_cache_tokens or batch * engine.max_seq_len) // batch, engine.max_seq_len)
    prompt = min(held // 2, LONGEST_PROMPT)
    if engine.backend == "torch":
        prompt = min(prompt, engine.max_num_tokens // batch)
    new = min(NEW_TOKENS, engine.max_seq_len // 2)
    # One more, which engines that answer whole requests take the time of.
    prompt = min(max(prompt, LEAST_PROMPT), engine.max_seq_len - new - 1)
    return Load(batch, prompt, new)


def alike(first: Load, second: Load) -> tuple[Load, Load]:
    """Returns both with the shorter lengths of the two, each at its own batch: so they can be compared."""
    prompt, new = (min(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    return Load(first.batch_size, prompt, new), Load(second.batch_size, prompt, new)
