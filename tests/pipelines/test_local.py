"""Runs on this machine: each has a folder of its own."""

from __future__ import annotations

import datetime
import io
import json

from rich.console import Console

from trimtab.pipelines import local


class _Noon(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, 12)


def test_runs_that_begin_in_the_same_second_are_two(tmp_path, monkeypatch):
    """What is read at the end is the run's own release, whichever folder is found first."""
    monkeypatch.setattr(local, "datetime", _Noon)
    monkeypatch.setattr(local.local, "init", lambda **settings: roots.append(settings["pipeline_root"]))
    roots, releases = [], []

    def pipeline(name: str):
        def run(**_) -> None:
            gate = local.Path(roots[-1]) / name / "gate"
            gate.mkdir(parents=True)
            output = {"parameterValues": {"Output": f"release of {name}"}}
            (gate / "executor_output.json").write_text(json.dumps(output))

        return run

    for name in ("zzz", "aaa"):
        monkeypatch.setattr(local, "optimize_pipeline", lambda unrolled, name=name: pipeline(name))
        outcome = local.run({"max_attempts": 1}, tmp_path / "runs", Console(file=io.StringIO()))
        releases.append(outcome.release)
    assert releases == ["release of zzz", "release of aaa"]
    assert [local.Path(root).name for root in roots] == ["20260101-120000", "20260101-120000-2"]
