"""What `trimtab run` prints at its end: the table, the report, and the next step; for scripts, events."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import runs
from rich.console import Console

from trimtab.base import progress
from trimtab.base.errors import InputError, NotReleased, StageError
from trimtab.pipelines import api, local
from trimtab.pipelines.commands import main
from trimtab.pipelines.local import Outcome

PAGE, LOG = Path("runs/1/report.html"), Path("runs/1/run.log")
RELEASE = "s3://models/trimtab/releases/SmolLM2-135M-Instruct/1"
RELEASED = Outcome(runs.RELEASED, PAGE, RELEASE, None, LOG)
NOTHING = Outcome(runs.NOTHING_ACCEPTED, PAGE, None, NotReleased("nothing is released: too few to tell"), LOG)
FAILED = Outcome(None, None, None, StageError("the disk is full"), LOG)
CASES = [
    (RELEASED, 0, "next trimtab pull SmolLM2-135M-Instruct served --store s3://models/trimtab"),
    (NOTHING, 3, "next int8_sq stood on the right side of its limit, and 1,000 items were too few to show it"),
    (FAILED, 4, "next the same command goes on from the stages that were complete"),
]


@pytest.mark.parametrize(("outcome", "code", "said"), CASES, ids=("released", "nothing", "failed"))
def test_it_ends_with_the_next_step(outcome, code, said, monkeypatch, capsys):
    monkeypatch.setattr(api, "run", lambda *arguments, **named: outcome)
    assert main.main(["run", "--model", "model"]) == code
    told = capsys.readouterr()
    assert said in " ".join((told.err if code else told.out).split())


@pytest.mark.parametrize(("outcome", "code", "said"), CASES, ids=("released", "nothing", "failed"))
def test_a_script_reads_how_it_ended(outcome, code, said, monkeypatch, capfd):
    monkeypatch.setattr(api, "run", lambda *arguments, **named: outcome)
    assert main.main(["run", "--model", "model", "--json"]) == code
    (end,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert (end["event"], end["exit_code"], end["log"]) == ("end", code, str(LOG))
    assert end["release"] == (outcome.release or "") and end["error"] == str(outcome.error or "")
    assert len(end["attempts"]) == (len(outcome.state.history) if outcome.state else 0)
    assert f"next {end['next'][0]}".startswith(said[:40])


def test_a_script_reads_of_bad_input(monkeypatch, capfd):
    def refuse(*arguments, **named):
        raise InputError("model: 'model' does not exist; write a folder")

    monkeypatch.setattr(api, "run", refuse)
    assert main.main(["run", "--model", "model", "--json"]) == 2
    (end,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert end == {"event": "end", "exit_code": 2, "error": "model: 'model' does not exist; write a folder"}


def test_events_are_lines_with_what_remains(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.ENVIRONMENT, str(tmp_path / "events.jsonl"))
    for done in range(3):
        progress.report("quantize", "searching scales", done, 2)
    stop, events = threading.Event(), io.StringIO()
    stop.set()
    local._follow(tmp_path / "events.jsonl", Console(file=io.StringIO()), stop, events)
    told = [json.loads(line) for line in events.getvalue().splitlines()]
    assert [(event["event"], event["stage"], event["done"]) for event in told] == [
        ("progress", "quantize", done) for done in range(3)
    ]
    assert told[0]["remaining"] is None and told[-1]["remaining"] == 0
