"""What the page of an attempt shows is the attempt's own."""

from __future__ import annotations

import json

import pytest

from trimtab.components.validation.stage import _Judge
from trimtab.evidence import look_name
from trimtab.loop.state import State
from trimtab.store import open_store


@pytest.mark.parametrize("baseline_first", [True, False])
def test_kernels_are_those_of_the_attempt_and_not_of_the_baseline(baseline_first, tmp_path):
    store = open_store(str(tmp_path / "store"))

    def tree(name: str):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kernels.json").write_text(json.dumps(name))
        return store.put(folder, kind="evaluation")

    state = State(store=store.uri, goal="fit_larger_model", target="cpu", model=tree("model"))
    judge = _Judge(store, state)
    measured = {look_name(1, baseline=True): tree("baseline"), look_name(1): tree("attempt")}
    order = list(measured) if baseline_first else list(measured)[::-1]
    judge.trees = {name: measured[name] for name in order}
    assert judge.read("kernels.json") == "attempt"
    judge.trees = {look_name(1, baseline=True): measured[look_name(1, baseline=True)]}
    assert judge.read("kernels.json") is None
