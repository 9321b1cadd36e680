"""A ruinous KV cache on a tiny model: the validation finds it to blame, and the loop drops it alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from trimtab import stages
from trimtab.base import child
from trimtab.components.fetch.source import fetch
from trimtab.components.validation import stage as validation
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, save
from trimtab.loop.state import State
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import Store, open_store

pytestmark = pytest.mark.slow

RECIPE = """
quantize: {format: int8_wo, kv_cache: fp8}
calibrate: {samples: 2, length: 64}
accept: {min_recovery: 0.9}
"""


class Run:
    """The stages and the validation, by the functions that the pipeline's tasks call."""

    def __init__(self, folder: Path):
        self.folder = folder
        model = tiny.write_model(folder / "model", layers=2)
        tiny.write_tasks(folder / "tasks", model, items=260)
        self.store: Store = open_store(str(folder / "store"))
        self.scales: dict[str, float] = {}

    def begin(self) -> State:
        evaluation = Evaluation(
            tasks=(tiny.TASK,), task_path=str(self.folder / "tasks"), items=(200, 30, 30), windows=(4, 4, 4),
            confirm_items=0, confirm_windows=0, window_tokens=64,
        )  # fmt: skip
        return decisions.begin(
            model=fetch(str(self.folder / "model"), self.store), store_uri=self.store.uri, name="tiny",
            goal="fit_larger_model", target="cpu", recipe=RECIPE, max_attempts=2, evaluation=evaluation,
        )  # fmt: skip

    def through(self, state: State) -> State:
        for name in stages.STAGES:
            if name == "quantize" and state.recipe.quantize and state.recipe.quantize.kv_cache != "none":
                self._file_ruined_export(state)
            state, _ = stages.advance(name, state)
        page, metrics = self.folder / "page.html", SimpleNamespace(log_metric=lambda *_: None)
        return load(validation.run(save(state), SimpleNamespace(path=str(page)), metrics))

    def _file_ruined_export(self, state: State) -> None:
        """Files, as what quantization made, good INT8 weights with scales at which keys and values are clipped."""
        from trimtab.components.quantization import work

        weights = self.folder / "weights"
        weights.mkdir()
        calibration = str(self.store.get(state.trees["calibration"]))
        settings = state.recipe.quantize.model_dump(mode="json")
        scratch = str(self.folder / "scratch")
        work.quantize(str(self.folder / "model"), calibration, None, str(weights), scratch, settings)
        ruined = tiny.write_kv_cache(weights, self.folder / "ruined", "FP8", 1e-5, 1e-5)
        stage = stages.STAGES["quantize"]
        key = stages.key_here(stage, state)
        tree = self.store.put(ruined, kind="export", metadata={"key": key})
        self.store.record(key, {"tree": tree.model_dump(), "metrics": {}, "seconds": 1.0})


@pytest.fixture
def forks(monkeypatch):
    """The stages' children share what they import, as in a run on one machine."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:  # a socket's path has 107 bytes at most
        monkeypatch.setenv(child.FORK_SERVER, str(Path(folder) / "socket"))
        yield


def test_a_ruinous_kv_cache_is_found_and_dropped_alone(tmp_path, forks):
    run = Run(tmp_path)
    state = run.through(run.begin())
    assert state.baseline.verdict.outcome == "baseline"

    state = run.through(decisions.next_attempt(state))
    blamed = state.history[0].verdict
    assert (blamed.outcome, blamed.failure_class) == ("rejected", "kv_cache_accuracy"), blamed.reason
    assert blamed.reason.startswith("the KV cache is to blame: perplexity ratio ")
    assert f"perplexity ratio {blamed.perplexity_ratio.estimate:.3f}" in blamed.reason
    assert "in 16 bits, which is accepted" in blamed.reason
    assert blamed.recovery.high < 0.9 or blamed.perplexity_ratio.low > 1.1, "the numbers are those of the export"

    assert decisions.decide(state) == "retry"
    state = decisions.next_attempt(state)
    assert state.recipe.quantize.model_dump() == {**state.history[0].recipe.quantize.model_dump(), "kv_cache": "none"}
    assert "the same with the KV cache in 16 bits" in state.why
    state = run.through(state)
    accepted = state.history[1].verdict
    assert accepted.outcome == "accepted", accepted.reason
    # What was blamed was blamed on the answers that the export without its KV cache then gave again.
    again = f"perplexity ratio {accepted.perplexity_ratio.estimate:.3f}"
    assert again in blamed.reason
    document = evidence.read(run.store, state.history[1].evaluation)
    assert set(document["measured"]) == {"integrity", "baseline-integrity", "baseline-look-1", "look-1"}
