"""Progress: one line an event, from many processes into one file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trimtab.base import progress


@pytest.fixture
def events(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv(progress.ENVIRONMENT, str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [(0, 0, "quantize: searching scales"), (3, 30, "quantize: searching scales (3/30)")],
)
def test_describe(done, total, line):
    assert progress.describe({"stage": "quantize", "text": "searching scales", "done": done, "total": total}) == line


def test_without_a_file_events_are_printed(monkeypatch, capsys):
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    progress.report("engine", "warm load")
    assert capsys.readouterr().err == "engine: warm load\n"


def test_track_yields_everything_and_reports_the_end(events):
    assert list(progress.track("abcdef", "prune", "zeroing", 6, every=60)) == list("abcdef")
    assert [(event["done"], event["total"]) for event in events()] == [(0, 6), (6, 6)]


def test_many_processes_write_whole_lines(events):
    code = "from trimtab.base import progress\nfor n in range(200): progress.report('x', 'y' * 300, n, 200)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(events()) == 800


def event(time: float, done: int, total: int = 30) -> dict:
    return {"time": time, "stage": "quantize", "text": "searching scales", "done": done, "total": total}


def test_what_remains_is_told_by_the_pace_so_far():
    pace = progress.Pace()
    assert pace.remaining(event(100, 0)) is None
    assert pace.remaining(event(130, 10)) == 60  # three seconds each, and 20 are left
    told = {**event(130, 10), "remaining": 60.0}
    assert progress.describe(told) == "quantize: searching scales (10/30, 60 s left)"
    assert pace.remaining(event(190, 30)) == 0 and "left" not in progress.describe({**event(190, 30), "remaining": 0})
    assert pace.remaining(event(200, 0)) is None  # the next attempt begins anew
    assert pace.remaining(event(260, 1)) == 60 * 29
    assert pace.remaining({**event(1, 0, 0)}) is None
