"""The same prompts to two versions of a service: how often they disagree, and how long the new one takes."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT = 120.0


@dataclass(frozen=True)
class Answer:
    """What a version said to one prompt, None when it did not answer, and the seconds it took."""

    text: str | None
    seconds: float


def ask(url: str, model: str, prompts: Sequence[str], max_tokens: int, timeout: float = TIMEOUT) -> list[Answer]:
    """Asks a server of OpenAI's completions API, greedily, one prompt after another; an error is no answer."""
    return [_ask(f"{url.rstrip('/')}/v1/completions", model, prompt, max_tokens, timeout) for prompt in prompts]


def _ask(url: str, model: str, prompt: str, max_tokens: int, timeout: float) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = json.load(response)["choices"][0]["text"]
    except (OSError, ValueError, LookupError, TypeError):
        text = None
    return Answer(text, time.monotonic() - started)


def refusal(
    new: Sequence[Answer],
    old: Sequence[Answer] | None,
    max_disagreement: float,
    max_latency_seconds: float | None,
) -> str | None:
    """Returns why the new version must not take over, or None.

    Args:
        new: its answers, one for each prompt, at least one.
        old: the answers of the version that serves, to the same prompts; None when there is none.
        max_disagreement: the largest share of prompts that may be answered otherwise, 0 to 1.
        max_latency_seconds: the largest 95th percentile of the new version's seconds; None for no limit.
    """
    silent = sum(answer.text is None for answer in new)
    if silent:
        return f"the new version leaves {silent} of {len(new)} prompts without an answer"
    if not any(answer.text.strip() for answer in new):
        return "the new version answers with empty texts only"
    if old is not None:
        rate = disagreement(new, old)
        if rate is None:
            return "the version that serves answers no prompt, so nothing can be compared"
        if rate > max_disagreement:
            pairs = sum(answer.text is not None for answer in old)
            return f"the versions disagree on {rate:.0%} of {pairs} prompts, more than {max_disagreement:.0%}"
    slow = percentile([answer.seconds for answer in new], 0.95)
    if max_latency_seconds is not None and slow > max_latency_seconds:
        return f"the new version takes {slow:.2f} s at the 95th percentile, more than {max_latency_seconds} s"
    return None


def disagreement(new: Sequence[Answer], old: Sequence[Answer]) -> float | None:
    """Returns the share of the prompts that both versions answer, and otherwise; None where there is no such prompt."""
    pairs = [(one.text, other.text) for one, other in zip(new, old, strict=True) if None not in (one.text, other.text)]
    return sum(one.strip() != other.strip() for one, other in pairs) / len(pairs) if pairs else None


def figures(new: Sequence[Answer], old: Sequence[Answer] | None) -> dict[str, float]:
    """Returns what a run shows of the comparison: counts, a share and seconds by name; what is unknown is absent."""
    found = {
        "prompts": float(len(new)),
        "unanswered": float(sum(answer.text is None for answer in new)),
        "seconds_95th_percentile": percentile([answer.seconds for answer in new], 0.95),
    }
    if old is not None:
        found["seconds_95th_percentile_before"] = percentile([answer.seconds for answer in old], 0.95)
        if (rate := disagreement(new, old)) is not None:
            found["disagreement"] = rate
    return found


def describe(found: dict[str, float]) -> str:
    """Returns the figures as a few words for people."""
    said = f"{found['prompts']:.0f} prompts answered, 95th percentile {found['seconds_95th_percentile']:.2f} s"
    if "disagreement" in found:
        before = found["seconds_95th_percentile_before"]
        said += f" (before: {before:.2f} s), {found['disagreement']:.0%} otherwise than before"
    return said


def percentile(seconds: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of the values do not exceed (nearest rank)."""
    return sorted(seconds)[math.ceil(share * len(seconds)) - 1]
