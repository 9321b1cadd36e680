"""What the page of an attempt shows is the attempt's own, and baseline and candidate are asked the same."""

from __future__ import annotations

import json

import pytest

from trimtab import stages
from trimtab.components.fetch.source import fetch
from trimtab.components.validation import page
from trimtab.components.validation.stage import _Judge
from trimtab.judge import Verdict
from trimtab.loop.evidence import CONFIRMATION, look_name
from trimtab.loop.state import Brief, State
from trimtab.planning.dealing import Deal
from trimtab.recipe import Engine, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages.looks import EVALUATE, Piece, Subject
from trimtab.store import Tree, open_store


@pytest.mark.parametrize("baseline_first", [True, False])
def test_kernels_are_those_of_the_attempt_and_not_of_the_baseline(baseline_first, tmp_path):
    store = open_store(str(tmp_path / "store"))

    def tree(name: str):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kernels.json").write_text(json.dumps(name))
        return store.put(folder, kind="evaluation")

    state = State(store=store.uri, goal="fit_larger_model", target="cpu", model=tree("model"))
    measured = {look_name(1, baseline=True): tree("baseline"), look_name(1): tree("attempt")}
    order = list(measured) if baseline_first else list(measured)[::-1]
    measured = {name: measured[name] for name in order}
    assert page.own_file(store, state, measured, "kernels.json") == "attempt"
    del measured[look_name(1)]
    assert page.own_file(store, state, measured, "kernels.json") is None


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [
        ({}, {}, 256),  # what the model can read
        ({"max_seq_len": 100}, {}, 100),
        ({}, {"max_seq_len": 100}, 100),
        ({"max_num_tokens": 64}, {"max_seq_len": 100}, 64),
        ({"max_seq_len": 100, "backend": "vllm"}, {}, 99),  # it generates a token behind what it scores
    ],
)
def test_both_are_asked_no_more_than_either_can_answer(own, base, expected):
    model = Tree(uri=f"file:///x/trees/{'a' * 64}", digest="a" * 64)
    subject = Subject(
        evaluation=Evaluation(), deal=Deal(looks=(), confirmation={}, fresh={}), model=model, reads=256,
        recipe=Recipe(engine=Engine(**own)), checkpoint=model, export=model, engine=model,
        baseline=Recipe(engine=Engine(**base)), baseline_engine=model,
    )  # fmt: skip
    assert subject.max_length == expected


def test_of_a_baseline_that_is_scored_block_by_block_likelihoods_are_asked_alone():
    """The same of the baseline itself and beside an attempt: one key finds both."""
    model, engine, own = (Tree(uri=f"file:///x/trees/{c * 64}", digest=c * 64) for c in "abc")
    blocks = Recipe(engine=Engine(by_block=True))
    about = {
        "evaluation": Evaluation(), "deal": Deal(looks=({"a": 9},) * 3, confirmation={}, fresh={}), "model": model,
        "reads": 256, "checkpoint": model,
    }  # fmt: skip
    alone = Subject(**about, recipe=blocks, export=model, engine=engine)
    beside = Subject(
        **about, recipe=Recipe(), export=own, engine=own, baseline=blocks, baseline_engine=engine
    )
    first = alone.evaluation_of(1)
    assert not first.parameters["speed"] and first == beside.evaluation_of(1, baseline=True)
    assert beside.evaluation_of(1).parameters["speed"]
    held = Recipe(engine=Engine())
    assert Subject(**about, recipe=held, export=model, engine=engine).evaluation_of(1).parameters["speed"]


def test_requests_that_were_cut_are_counted_once_for_the_attempt(tmp_path, write_model, monkeypatch):
    """Baseline and attempt are cut alike, and the attempt with 16 bits in its KV cache answers the same again."""
    store = open_store(str(tmp_path / "store"))
    model = fetch(str(write_model(tmp_path / "model")), store)
    brief = Brief(recipe=Recipe(), verdict=Verdict(outcome="baseline", reason="unchanged"), engine=model)
    state = State(
        store=store.uri, goal="fit_larger_model", target="cpu", model=model, baseline=brief, attempt=1
    )
    measured = stages.Result(tree=model, metrics={"truncated": 3}, seconds=1.0, hit=False)
    monkeypatch.setattr(stages, "cached", lambda *_: measured)
    judge = _Judge(store, state)
    for look in (1, CONFIRMATION):
        for name in (look_name(look, baseline=True), look_name(look), look_name(look, kv_cache="none")):
            judge._measure(name, Piece(EVALUATE, {}, {"engine": model, "export": model}, "torch"))
    assert judge.truncated == 6
