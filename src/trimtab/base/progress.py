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
    """Returns the event as a line for people: 'quantize: searching scales (3/30)'."""
    counted = f" ({event['done']}/{event['total']})" if event["total"] else ""
    return f"{event['stage']}: {event['text']}{counted}"


def track(items: Iterable[Item], stage: str, text: str, total: int, every: float = 2.0) -> Iterator[Item]:
    """Yields the items and reports how many are done, at most once in `every` seconds, and at the end."""
    last = 0.0
    for done, item in enumerate(items):
        if time.monotonic() - last >= every:
            report(stage, text, done, total)
            last = time.monotonic()
        yield item
    report(stage, text, total, total)
