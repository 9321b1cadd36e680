"""What tests of evidence share: a store in a folder, and answers that a model gave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trimtab.store import Tree, open_store

ITEMS, WINDOWS = 300, 16


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def scored(store, tmp_path):
    """A function: files what a model scored at a look, `lost` of its right answers turned wrong."""
    count = iter(range(1000))

    def put(look: int, lost: float = 0.0, ratio: float = 1.0, items: int = ITEMS, windows: int = WINDOWS) -> Tree:
        folder = tmp_path / f"scored-{next(count)}"
        folder.mkdir()
        span = range((look - 1) * ITEMS, (look - 1) * ITEMS + items)
        rows = [
            {"id": f"item/{n}", "score": float(n % 5 != 0 and n % 100 >= lost * 100), "chance": 0.25} for n in span
        ]
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        nll = [100 * (3 + np.log(ratio) + 0.01 * np.cos(n)) for n in range(windows)]
        document = {"start": (look - 1) * WINDOWS, "nll": nll, "tokens": [100] * windows}
        (folder / "windows.json").write_text(json.dumps(document))
        return store.put(folder, kind="evaluation", metadata={"n": folder.name})

    return put
