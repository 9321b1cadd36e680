"""Give lm-eval the items of a task without the cache of the ``datasets`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

# lm-eval resolves paths in a task file against the working directory; this module knows its own place.
DATA = Path(__file__).resolve().parent / "data"


def load(items: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the test split of a task, held in memory; lm-eval passes the task's metadata as well."""
    lines = (DATA / f"{items}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
