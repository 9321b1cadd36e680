"""Tells people how far long work is: to the terminal that started the run, or to the pod's log.

The command line sets TRIMTAB_PROGRESS to a file that it follows; every process of the run appends one JSON
line an event. Without it, events are printed, which is what `kubectl logs` and the KFP UI show.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

ENVIRONMENT = "TRIMTAB_PROGRESS"

Item = TypeVar("Item")


def report(stage: str, text: str, done: int = 0, total: int = 0) -> None:
    """Reports one event; `done` of `total` where the work can be counted."""
    event = {"time": time.time(), "stage": stage, "text": text, "done": done, "total": total}
    path = os.environ.get(ENVIRONMENT)
    if path:
        with open(
            path, "a", encoding="utf-8"
        ) as file:  # one short append: whole lines, also from many processes
            file.write(json.dumps(event) + "\n")
    else:
        print(describe(event), file=sys.stderr, flush=True)


def describe(event: dict) -> str:
    """Returns the event as a line for people: 'quantize: searching scales (3/30, 40 s left)'."""
    left = f", {_duration(event['remaining'])} left" if event.get("remaining") else ""
    counted = f" ({event['done']}/{event['total']}{left})" if event["total"] else ""
    return f"{event['stage']}: {event['text']}{counted}"


class Pace:
    """How long counted work takes, by what is done since it was first heard of."""

    def __init__(self) -> None:
        #: What is counted -> when it was first heard of, how much was done then, and how much at last.
        self._heard: dict[tuple[str, str, int], tuple[float, int, int]] = {}

    def remaining(self, event: dict) -> float | None:
        """Returns the seconds until all of `total` is done; None while nobody can know, and 0 at the end."""
        done, total = event["done"], event["total"]
        what = event["stage"], event["text"], total
        since, before, last = self._heard.get(what, (event["time"], done, done))
        if done < last:  # the same work again
            since, before = event["time"], done
        self._heard[what] = since, before, done
        if not total or done <= before:
            return None
        return round((event["time"] - since) / (done - before) * (total - done), 1)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def track(items: Iterable[Item], stage: str, text: str, total: int, every: float = 2.0) -> Iterator[Item]:
    """Yields the items and reports how many are done, at most once in `every` seconds, and at the end."""
    last = 0.0
    for done, item in enumerate(items):
        if time.monotonic() - last >= every:
            report(stage, text, done, total)
            last = time.monotonic()
        yield item
    report(stage, text, total, total)
