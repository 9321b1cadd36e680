"""The loop, through the real DAG in processes of their own; what `filed` has filed decides how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from kfp import local

from trimtab.base.errors import StageError
from trimtab.pipelines.rebuild import rebuild_pipeline
from trimtab.pipelines.tasks import forked

from .filed import BAD, GOOD, KV_RECIPE, Scores, arguments, told

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    attempts: list[str]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    max_attempts: int = 1
    unrolled: int | None = None
    fails: str = ""  # work that is not filed
    failing: str = ""  # how the run's process then fails
    reason: str = ""  # part of what the gate says
    exit_code: int = 3


CASES = {
    "accepted third": Case(
        ["int4_rtn rejected accuracy", "int4_gptq rejected accuracy", "mixed accepted confirmed"],
        scores={"int4_rtn": BAD, "int4_gptq": BAD},
        max_attempts=3,
        exit_code=0,
    ),
    "a run's own max_attempts stops before the unrolled ones are used up": Case(
        ["int4_rtn rejected accuracy", "int4_gptq rejected accuracy"],
        scores={"int4_rtn": BAD, "int4_gptq": BAD},
        max_attempts=2,
        unrolled=3,
        reason="is below the limit 0.95",
    ),
    "a stage that cannot do it leads to another format": Case(
        ["int4_rtn rejected unsupported", "int4_gptq accepted confirmed"],
        max_attempts=2,
        fails="int4_rtn quantize",
        failing="unsupported:no kernel for it",
        exit_code=0,
    ),
    "a stage that is killed for memory is a verdict, not a crash": Case(
        ["int4_rtn rejected does_not_fit"],
        fails="int4_rtn quantize",
        failing="killed",
        reason="quantize was killed: it needed more memory than there is",
    ),
    "a baseline that fails leads to no attempt": Case(
        [], fails="baseline engine", failing="export_damaged:the likelihood is nan", reason="the likelihood is nan"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loop(name, script, run_dag, tripwire, tmp_path, monkeypatch):
    case = CASES[name]
    script.file(case.scores, case.fails)
    monkeypatch.setenv("FAILING", case.failing)
    outcome = run_dag(arguments(script, case.max_attempts), tmp_path / "runs", case.unrolled)
    assert outcome.state is not None, outcome.log.read_text()[-5000:]
    assert told(outcome.state) == case.attempts
    assert tripwire.touched == bool(case.fails), "work is done where nothing was filed, and nowhere else"
    # The summary tells every outcome.
    page = outcome.page.read_text()
    assert all(brief.recipe.title in page for brief in outcome.state.history)
    releases = script.store.releases("tiny")
    if case.exit_code == 0:
        assert outcome.error is None
        assert [release["uri"] for release in releases] == [outcome.release]
        assert releases[0]["record"]["recipe"] == outcome.state.history[-1].recipe.to_dict()
    else:
        assert outcome.error.exit_code == case.exit_code
        assert case.reason in str(outcome.error) and case.reason in page
        assert outcome.release is None and releases == []


def test_a_stage_that_somebody_killed_is_no_verdict(script, run_dag, tripwire, tmp_path, monkeypatch):
    script.file({}, "int4_rtn quantize")
    monkeypatch.setenv("FAILING", "ended")
    outcome = run_dag(arguments(script, 1), tmp_path / "runs")
    assert isinstance(outcome.error, StageError) and outcome.error.exit_code == 4 and outcome.state is None
    assert str(outcome.error).startswith("quantize was killed by somebody")


def test_accepted_first_and_again(script, run_dag, tripwire, tmp_path):
    """The same run once more finds everything, and the release too; a rebuild finds nothing to do."""
    script.file({})
    first = run_dag(arguments(script, 1), tmp_path / "runs-1")
    assert first.error is None, first.log.read_text()[-5000:]
    assert told(first.state) == ["int4_rtn accepted confirmed"]
    (brief,) = first.state.history
    assert brief.recipe.title in first.page.read_text()
    assert [release["record"]["recipe"] for release in script.store.releases("tiny")] == [brief.recipe.to_dict()]
    again = run_dag(arguments(script, 1), tmp_path / "runs-2")
    assert first.release == again.release == f"{script.store.uri}/releases/tiny/000001"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "runs-3"), raise_on_error=False)
    with forked():
        rebuild_pipeline(unrolled=1)(**arguments(script, 1))
    (task,) = (tmp_path / "runs-3").glob("rebuild-*/*")
    assert (task / "changes").read_text().startswith(f"# Nothing changed: {first.release} stands")
    assert len(script.store.releases("tiny")) == 1
    assert not tripwire.touched


def test_a_kv_cache_that_is_to_blame_is_dropped_alone(kv_script, run_dag, tripwire, tmp_path):
    """Through the real DAG: the weights of the first attempt are released without its KV cache."""
    kv_script.file({"int4_rtn + nvfp4 KV": BAD}, kv_cache_apart=GOOD)
    outcome = run_dag({**arguments(kv_script, 2), "recipe": KV_RECIPE}, tmp_path / "runs")
    assert outcome.error is None, outcome.log.read_text()[-5000:]
    assert told(outcome.state) == ["int4_rtn rejected kv_cache_accuracy", "int4_rtn accepted confirmed"]
    first, second = (brief.recipe.quantize.model_dump() for brief in outcome.state.history)
    assert second == {**first, "kv_cache": "none"}
    assert not tripwire.touched
    assert "the KV cache is to blame" in outcome.page.read_text()
