"""benchmarks/distillation.py on a tiny random model: it runs, and what it knows is on disk at once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = ["recovery", "movement", "equal_bytes", "processes"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the benchmark, and returns its exit code, the lines of --out and what it printed."""
    monkeypatch.syspath_prepend(FOLDER)
    distillation = importlib.import_module("distillation")

    def run(*arguments: str, **rows):
        for name, row in rows.items():
            monkeypatch.setitem(distillation.ROWS, name, row)
        out = tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", ["distillation.py", "--quick", "--out", str(out), *arguments])
        code = distillation.main()
        lines = out.read_text().splitlines() if out.exists() else []
        return code, [json.loads(line) for line in lines], capsys.readouterr().out

    return run


@pytest.mark.slow
def test_rows_in_a_row(run):
    code, lines, printed = run("--sparsities", "0.85", "--rows", *ROWS)
    assert code == 0
    names = {row: [line["name"] for line in lines if line["row"] == row] for row in ROWS}
    assert names["recovery"] == ["dense", "pruned", "distilled"]
    assert names["movement"] == ["movement 85%", "gradual magnitude 85%"]
    assert len(names["equal_bytes"]) == 2
    assert names["processes"] == ["1 processes", "2 processes"]
    one, two = (line["heldout_loss"] for line in lines if line["row"] == "processes")
    assert two == pytest.approx(one, rel=1e-3)
    assert all(line["perplexity"] > 1 for line in lines if line["row"] != "processes")
    assert json.loads(printed.splitlines()[-1])["recovery"]["pruned"]["perplexity"] == lines[1]["perplexity"]


def test_what_would_not_end_in_time_is_left_out(run):
    code, lines, printed = run("--minutes", "0", "--rows", "movement")
    assert code == 0 and not lines
    assert "movement: movement 85% is left out: it takes about" in printed


def test_a_row_that_fails_costs_no_other(run):
    def fails(benchmark):
        yield "first", {"perplexity": 2.0}
        raise RuntimeError("out of luck")

    def works(benchmark):
        yield "second", {"perplexity": 3.0}

    code, lines, _ = run("--rows", "recovery", "movement", recovery=fails, movement=works)
    assert code == 1
    assert [line.get("name", line.get("error")) for line in lines] == ["first", "RuntimeError: out of luck", "second"]
