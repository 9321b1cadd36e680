"""How many tokens a timed repeat of decoding has: as asked for, or what a slow machine writes in bounded time."""

from __future__ import annotations

from trimtab.runtime.engines.protocol import Engine

#: Seconds that the repeats of one engine at one batch size may take together.
SECONDS = 6.0
#: Tokens of a trial, and the fewest of a repeat: a speed is the time of these steps, so one slow step is no speed.
FEWEST = 8


def new_tokens(
    engine: Engine, batch_size: int, prompt_tokens: int, most: int, repeats: int, seconds: float = SECONDS
) -> int:
    """Returns the tokens that each sequence is continued by in a repeat.

    Every repeat is shorter where time is short, and none is left out: the median is still one of as many repeats. What
    is timed stays the same too, whole steps behind a prompt of the same length; all that is lost is steps at the end,
    whose KV cache is longer by less than a prompt.

    Args:
        most: tokens where time does not matter.
        repeats: timed ones; an untimed one comes first.
    """
    speed = _speed(engine, batch_size, prompt_tokens)
    return int(min(most, max(min(FEWEST, most), seconds * speed / batch_size / (repeats + 1))))


def _speed(engine: Engine, batch_size: int, prompt_tokens: int) -> float:
    """Tokens a second in a trial. A GPU is never slow enough, and would record a graph for it."""
    if engine.device_bytes:
        return float("inf")
    return engine.decode_speed(batch_size, prompt_tokens, FEWEST, 1)[0]
