"""benchmarks/apart.py: work in a process of its own is a row, whether it succeeds, fails or does not end."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    found = importlib.import_module("apart")
    for name, value in found.ENVIRONMENT.items():  # a call sets it; this takes it back
        monkeypatch.setenv(name, value)
    return found


def test_what_work_returns_and_the_seconds_it_took(apart):
    row = apart.call("json:loads", s='{"speed": 2}')
    assert row.pop("seconds") > 0
    assert row == {"speed": 2}


def test_work_that_does_not_end_is_ended(apart, monkeypatch):
    monkeypatch.setattr(apart, "LIMIT", 0.5)
    row = apart.call("subprocess:run", args=["sleep", "60"])
    assert row["error"] == "StageError: run was not done after 0.5 s and was ended; see its log above"
    assert row["seconds"] < 30


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize(("work", "arguments", "error"), [
    ("vllm_agreement:open_engine", {"name": "vllm", "folder": "", "checkpoint": None}, "it has no vLLM; write 'torch'"),
    ("vllm_decode:decode", {"form": "bf16", "batches": [1], "quick": True}, "No module named 'vllm'"),
])  # fmt: skip
def test_a_benchmark_says_that_vllm_is_missing(apart, work, arguments, error):
    assert error in apart.call(work, **arguments)["error"]


def test_rows_are_printed_and_added_to_a_file(apart, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    for number in (1, 2):
        apart.tell({"row": number}, out)
    apart.tell({"row": 3}, None)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [1, 2]
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3]
