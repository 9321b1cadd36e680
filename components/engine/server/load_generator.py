"""A load generator: requests that arrive as a Poisson process with mixed lengths, and what became of them.

aiperf and guidellm measure a server from outside, and work with `trimtab serve`. Here the same arrivals meet the same
engine under different batching, and the KV cache is looked into at every step, which no client can do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab.judge.statistics import t_quantile
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine

#: Percentiles that are told of every latency.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, as prompts and answers of chats have them: many short, few long.

    Args:
        median, longest: of the distribution; what is drawn longer, or shorter than 1, is cut.
        spread: standard deviation of the logarithm; 0 makes all lengths equal.
    """

    median: int
    longest: int
    spread: float = 0.8

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        drawn = generator.lognormal(math.log(self.median), self.spread, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(int).tolist()


@dataclass(frozen=True)
class Workload:
    """`requests` that arrive at a `rate` a second on average; an infinite rate has all of them come at once."""

    requests: int
    rate: float
    prompt: Lengths
    answer: Lengths

    def draw(self, seed: int, vocabulary: int) -> list[tuple[float, GenerationRequest]]:
        """Returns (seconds from the beginning, request), in the order of arrival."""
        generator = np.random.default_rng(seed)
        gaps = generator.exponential(1 / self.rate, self.requests) if math.isfinite(self.rate) else [0] * self.requests
        lengths = zip(
            self.prompt.draw(self.requests, generator), self.answer.draw(self.requests, generator), strict=True
        )
        requests = [
            GenerationRequest(generator.integers(0, vocabulary, prompt).tolist(), answer, ignore_eos=True)
            for prompt, answer in lengths
        ]
        return list(zip(np.cumsum(gaps).tolist(), requests, strict=True))


@dataclass
class Run:
    """What happened: requests with the times of their tokens, and the KV cache after each step.

    `seconds` from the first arrival to the last token; `used` blocks and `wasted` tokens of owned blocks after each
    step, `running` sequences likewise.
    """

    requests: list[GenerationRequest]
    seconds: float = 0.0
    used: list[int] = field(default_factory=list)
    wasted: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)


def replay(engine: PagedEngine, arrivals: Sequence[tuple[float, GenerationRequest]]) -> Run:
    """Lets requests arrive in real time and computes all of them."""
    run = Run([request for _, request in arrivals])
    left = list(arrivals)[::-1]
    pool, scheduler = engine.pool, engine.scheduler
    started = time.monotonic()
    while left or not scheduler.idle:
        now = time.monotonic()
        while left and started + left[-1][0] <= now:
            due, request = left.pop()
            request.arrived = started + due  # it may have had to wait for the last step to end
            engine.submit(request)
        scheduler.draining = not left
        if engine.step() is None:
            if left:
                time.sleep(min(0.001, max(0, started + left[-1][0] - time.monotonic())))
            continue
        run.used.append(pool.used)
        run.running.append(len(scheduler.running))
        owned = pool.used * pool.block_size
        held = sum(sequence.computed for sequence in scheduler.running)
        run.wasted.append((owned - held) / owned if owned else 0.0)
    scheduler.draining = False
    run.seconds = time.monotonic() - started
    return run


@dataclass(frozen=True)
class Objective:
    """What a user expects: seconds to the first token, and seconds between tokens on average."""

    first_token: float
    between_tokens: float


def figures(run: Run, objective: Objective) -> dict[str, float]:
    """Returns the figures of one run: latencies in seconds, tokens and good requests a second, shares from 0 to 1."""
    first = [request.times[0] - request.arrived for request in run.requests]
    between = [b - a for request in run.requests for a, b in zip(request.times, request.times[1:], strict=False)]
    whole = [request.times[-1] - request.arrived for request in run.requests]
    good = [
        f <= objective.first_token and (w - f) / max(1, len(r.times) - 1) <= objective.between_tokens
        for r, f, w in zip(run.requests, first, whole, strict=True)
    ]
    found = {
        "tokens_per_second": sum(len(request.new_tokens) for request in run.requests) / run.seconds,
        "goodput_requests_per_second": sum(good) / run.seconds,
        "kv_blocks_used_mean": float(np.mean(run.used)),
        "kv_blocks_used_peak": max(run.used),
        "kv_wasted_share": float(np.mean(run.wasted)),
        "sequences_peak": max(run.running),
        "preemptions": sum(request.preemptions for request in run.requests),
    }
    for name, values in (("first_token", first), ("between_tokens", between), ("latency", whole)):
        for percentile in PERCENTILES if values else ():
            found[f"{name}_p{percentile}"] = float(np.percentile(values, percentile))
    return found


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns the mean of repeats and half the width of its confidence interval by Student's t, NaN of one repeat."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, error * t_quantile(0.5 + confidence / 2, count - 1)
