"""What `trimtab watch` tells of a run on a Kubeflow Pipelines server, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.loop import status
from trimtab.pipelines.cluster import connection, watch
from trimtab.pipelines.commands import main
from trimtab.store import open_store


@pytest.fixture(scope="module")
def rebuilding(package: Path) -> Path:
    output = package.with_name("rebuild.yaml")
    assert main.main(["compile", "-o", str(output), "--max-attempts", "1", "--pipeline", "rebuild"]) == 0
    return output


def story(package: Path, *looks: tuple[str, list[tuple[str, str]]], store: str) -> list[dict[str, Any]]:
    """Looks at a run: (its state, [(key of a task, its state), …]), as the server shows them."""
    spec = yaml.safe_load(package.read_text())
    return [
        {
            "state": state,
            "pipeline_spec": spec,
            "runtime_config": {"parameters": {"store": store}},
            "run_details": {
                "task_details": [
                    {
                        "task_id": str(number),
                        "display_name": key,
                        "state": task,
                        "create_time": f"2026-11-24T10:00:{number:02d}Z",
                    }
                    for number, (key, task) in enumerate(tasks)
                ]
            },
        }
        for state, tasks in looks
    ]


def attempts_told(store: Path, run: str, *outcomes: str) -> None:
    lines = [
        {"recipe": f"recipe {number}", "outcome": outcome, "reason": f"reason {number}"}
        for number, outcome in enumerate(outcomes)
    ]
    open_store(str(store)).write_status(run, "attempts", lines)


BEGINNING = [("fetch", "SUCCEEDED"), ("attempt", "SUCCEEDED"), ("prepare", "SUCCEEDED"), ("attempt-2", "RUNNING")]
ENDS = [
    ("SUCCEEDED", "accepted", [("gate", "SUCCEEDED")], 0, "the run released its model"),
    ("FAILED", "rejected", [("summarize", "SUCCEEDED"), ("gate", "FAILED")], 3, "no recipe passed: reason 1"),
    ("FAILED", "accepted", [("gate", "FAILED")], 4, "deploy gate failed"),
    ("FAILED", "rejected", [("quantize", "FAILED")], 4, "attempt 1, quantize failed"),
    ("FAILED", "rejected", [("quantize", "RUNNING")], 4, "quantize was killed: its pod ended without a word"),
    ("CANCELED", "rejected", [], 4, "the run was canceled; submit it again"),
]


@pytest.mark.parametrize(("state", "outcome", "last", "exit_code", "says"), ENDS)
def test_watch(state, outcome, last, exit_code, says, server, package, trimtab, tmp_path):
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(
        package, ("PENDING", []), ("RUNNING", BEGINNING), (state, [*BEGINNING, *last]), store=str(tmp_path / "store")
    )
    attempts_told(tmp_path / "store", "r-1", "baseline", outcome)
    code, said = trimtab("watch", f"{server.host}/#/runs/details/r-1")
    assert (code, says in said) == (exit_code, True), said
    assert "fetch model: done baseline: done baseline, prepare: done attempt 1: running" in said
    assert said.count(f"attempt 1, recipe 1: {outcome}; reason 1") == 1


def test_watch_a_pod_that_is_begun_again(server, package, trimtab, tmp_path):
    """Argo numbers the pods of a task; the stage itself goes on."""
    server.kept["runs"].append({"run_id": "r-1"})
    stage = [*BEGINNING, ("quantize", "RUNNING"), ("executor(0)", "FAILED"), ("executor(1)", "RUNNING")]
    server.story = story(package, ("RUNNING", stage), ("RUNNING", stage), ("SUCCEEDED", BEGINNING), store=str(tmp_path))
    code, said = trimtab("watch", "r-1")
    assert code == 0 and said.count("attempt 1, quantize: its pod was killed; begun again, try 2") == 1, said


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (["review"], "nothing has changed, so the run kept the last release"),
        (["review", "attempt", "gate"], "the run released its model"),
    ],
)
def test_watch_a_rebuild(tasks, says, rebuilding, server, tmp_path, trimtab):
    server.kept["runs"].append({"run_id": "r-1"})
    done = [(key, "SUCCEEDED") for key in tasks]
    server.story = story(rebuilding, ("SUCCEEDED", done), store=str(tmp_path / "store"))
    code, said = trimtab("watch", "r-1")
    assert (code, says in said, "what changed?: done" in said) == (0, True, True), said


ROLLED_OUT = [
    ("SUCCEEDED", [("roll-out", "SUCCEEDED")], "assistant serves 0123456789ab", 0, "the run released its model"),
    (
        "FAILED",
        [("roll-out", "SUCCEEDED"), ("fail-rollout", "FAILED")],
        "assistant: rolled back, r1 serves",
        3,
        "the run released its model, which does not serve: assistant: rolled back, r1 serves",
    ),
    ("FAILED", [("roll-out", "FAILED")], "assistant: applied", 4, "rollout failed; its log is on the run's page"),
]


@pytest.mark.parametrize(("state", "last", "line", "exit_code", "says"), ROLLED_OUT)
def test_watch_a_rollout(state, last, line, exit_code, says, server, package, capsys, tmp_path):
    """What happens in it is shown as it happens, with the command by which a person approves on one line."""
    run = "0b0c4b6e-3b7d-4c57-9d55-6f2b7c1d8a90"
    waits = f"waits up to 60 minutes for approval: kubectl {'-' * 150} -p '{{}}'"
    status.write_rollout(open_store(str(tmp_path / "store")), run, [waits, line])
    attempts_told(tmp_path / "store", run, "baseline", "accepted")
    server.kept["runs"].append({"run_id": run})
    done = [*BEGINNING, ("gate", "SUCCEEDED")]
    server.story = story(package, ("RUNNING", done), (state, [*done, *last]), store=str(tmp_path / "store"))
    code = main.main(["watch", run])
    said = capsys.readouterr().err
    assert said.count(f"rollout: {waits}\n") == 1 and f"rollout: {line}\n" in said
    assert (code, says in " ".join(said.split())) == (exit_code, True), said


def test_a_run_that_is_no_longer_watched_goes_on(server, package, trimtab, monkeypatch):
    def interrupted(connection, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", interrupted)
    code, said = trimtab("watch", "r-1")
    assert code == 130 and "the run goes on, and `trimtab watch r-1` follows it again" in said


def test_watch_without_the_store(server, package, trimtab):
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(package, ("RUNNING", BEGINNING), ("SUCCEEDED", BEGINNING), store="gs://elsewhere")
    code, said = trimtab("watch", "r-1")
    assert code == 0 and said.count("verdicts are not shown, the run's page has them") == 1


def test_a_lost_connection_is_tried_again(server, package, trimtab, monkeypatch):
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: None)
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(package, ("SUCCEEDED", BEGINNING), store="gs://elsewhere")
    server.faults = [("drop", "")] * 5 + [(503, "busy")] * 2
    code, said = trimtab("watch", "r-1")
    assert (code, "does not answer; trying again" in said) == (0, True), said
    assert server.faults == []


def test_no_such_run(server, trimtab):
    code, said = trimtab("watch", "r-9")
    assert (code, "cannot read run 'r-9'" in said and "Run r-9 not found" in said) == (2, True)
