"""Both checkpoints of the integrity gate are read ahead of what compares them."""

from __future__ import annotations

import sys
import threading

import pytest

from trimtab.components.validation.integrity import reading


def test_what_is_left_of_a_stream_may_be_collected_by_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a comparison failed, and the failure's traceback held the stream for longer."""
    go, gone, wrong = threading.Event(), threading.Event(), []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: wrong.append(told.exc_value))

    def read(item: int) -> int:
        if item == 2:
            go.wait(60)
            held.clear()
            gone.set()
        return item

    held = [reading.ahead(range(100), read)]
    assert next(held[0]) == (0, 0)
    go.set()
    assert gone.wait(60)
    assert wrong == []
