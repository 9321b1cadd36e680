"""What a run tells those who watch it from elsewhere."""

from __future__ import annotations

import pytest

from trimtab.base import progress
from trimtab.judge import Verdict
from trimtab.loop import status
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.store import open_store

RUN, OTHER = "0b0c4b6e-3b7d-4c57-9d55-6f2b7c1d8a90", "7d1f2a34-5b6c-4d7e-8f90-a1b2c3d4e5f6"


@pytest.fixture
def state(tmp_path) -> State:
    store = open_store(str(tmp_path / "store"))
    verdicts = [
        Verdict(outcome="baseline", reason="the model unchanged"),
        Verdict(outcome="rejected", failure_class="accuracy", reason="recovery is below the limit"),
    ]
    recipes = [Recipe(), Recipe.parse("quantize: {format: int8_wo}")]
    briefs = [Brief(recipe=recipe, verdict=verdict) for recipe, verdict in zip(recipes, verdicts, strict=True)]
    model = store.put_json("model", {})
    return State(
        store=store.uri, goal="lower_cost", target="cpu", model=model, baseline=briefs[0], history=(briefs[1],)
    )


def test_told(state):
    store = open_store(state.store)
    assert status.attempts(store, RUN) == []
    status.write_attempts(state.model_copy(update={"history": ()}), RUN)
    status.write_attempts(state, RUN)
    told = status.attempts(store, RUN)
    assert [line["outcome"] for line in told] == ["baseline", "rejected"]
    assert told[1] == {"recipe": "int8_wo", "outcome": "rejected", "reason": "recovery is below the limit"}
    assert status.attempts(store, OTHER) == []


def test_the_rollout_is_told_beside_the_verdicts(state):
    store = open_store(state.store)
    assert status.rollout(store, RUN) == []
    status.write_attempts(state, RUN)
    status.write_rollout(store, RUN, ["applied"])
    status.write_rollout(store, RUN, ["applied", "rolled back"])
    assert status.rollout(store, RUN) == ["applied", "rolled back"] and len(status.attempts(store, RUN)) == 2


def test_told_though_its_trees_are_gone(state, tmp_path):
    """The record names no tree, so what is collected later takes no verdict with it."""
    status.write_attempts(state, RUN)
    for path in (tmp_path / "store" / "trees").iterdir():
        path.unlink()
    assert len(status.attempts(open_store(state.store), RUN)) == 2


def test_trouble_of_the_store_does_not_fail_the_run(state, monkeypatch, capsys):
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    status.write_attempts(state.model_copy(update={"store": "gs://elsewhere"}), RUN)
    assert "those who watch do not see it" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["", "4711471147", "{{$.pipeline_job_uuid}}"])
def test_a_run_on_this_machine_tells_its_terminal(run, state, tmp_path):
    status.write_attempts(state, run)
    assert not (tmp_path / "store" / "status").exists()
