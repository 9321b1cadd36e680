"""Which trouble another try may not meet."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trimtab.base import child, errors, transient
from trimtab.base.errors import Transient


class ReadTimeout(OSError):
    """As requests and httpx call it."""


class Answered(OSError):
    def __init__(self, status: int):
        super().__init__(f"it answered {status}")
        self.response = SimpleNamespace(status_code=status)


CASES = [
    (ConnectionResetError("connection reset by peer"), True),
    (TimeoutError(), True),
    (ReadTimeout(), True),
    (Answered(503), True),
    (Answered(429), True),
    (Answered(404), False),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
    (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), True),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
    (ValueError("GPU is lost"), False),
    (FileNotFoundError("config.json"), False),
]


@pytest.mark.parametrize(("error", "expected"), CASES)
def test_what_passes(error, expected):
    assert transient.passes(error) == expected


def test_a_child_tells_its_parent(monkeypatch):
    def lost() -> None:
        raise ConnectionResetError("connection reset by peer")

    with pytest.raises(Transient, match="teach: ConnectionResetError"):
        child.done(child.outcome("teach", lost))


def test_a_pod_waits_and_a_person_does_not(monkeypatch, capsys):
    slept, tries = [], []
    monkeypatch.setattr(transient.time, "sleep", slept.append)

    def action() -> str:
        tries.append(1)
        if len(tries) < 4:
            raise errors.Unreachable("the store does not answer")
        return "done"

    monkeypatch.delenv(transient.POD, raising=False)
    with pytest.raises(errors.Unreachable):
        transient.insist("plan", action)
    monkeypatch.setenv(transient.POD, "10.0.0.1")
    assert transient.insist("plan", action) == "done" and slept == [10.0, 60.0]
