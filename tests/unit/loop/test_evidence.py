"""The evidence: what was measured, read back, and judged anew. What the gate refuses is in pipelines/test_gate.py."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.base import environment
from trimtab.base.errors import InputError, StoreError
from trimtab.judge import NotPaired
from trimtab.loop import evidence
from trimtab.loop.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.loop.state import State
from trimtab.recipe import Recipe
from trimtab.store import Tree

RECIPE = Recipe()
ITEMS, WINDOWS = 300, 16


def measured(scored, *losses: float) -> dict[str, Tree]:
    trees = {}
    for look, lost in enumerate(losses, start=1):
        trees[look_name(look, baseline=True)] = scored(look)
        trees[look_name(look)] = scored(look, lost, 1.01)
    return trees


def test_scores_of_several_looks_are_joined_in_order(store, scored):
    scores = evidence.read_scores(store, [scored(1), scored(2)])
    assert scores.item_ids.tolist() == [f"item/{n}" for n in range(2 * ITEMS)]
    assert scores.window_ids.tolist() == [str(n) for n in range(2 * WINDOWS)]
    assert scores.items.mean() == pytest.approx(0.8)
    assert scores.perplexity == pytest.approx(np.exp(3), rel=0.02)


@pytest.mark.parametrize("left", [{"items": 0}, {"windows": 0}])
def test_nothing_left_to_judge_on(store, scored, left):
    with pytest.raises(InputError, match="there are no items left to judge on; name more tasks or ask for fewer"):
        evidence.read_scores(store, [scored(1, **left)])


@pytest.mark.parametrize(
    ("losses", "look", "outcome"),
    [
        ([0.0], 1, "accepted"),
        ([0.5], 1, "rejected"),
        ([0.04], 1, "indeterminate"),
        ([0.04, 0.0], 2, "indeterminate"),
        ([0.03, 0.0, 0.0], 3, "accepted"),
        ([0.04, 0.5], 2, "rejected"),
        ([0.04, 0.5], 1, "indeterminate"),  # a look reads nothing of later ones
    ],
)
def test_judged_from_everything_so_far(store, scored, losses, look, outcome):
    assert evidence.judge_looks(store, measured(scored, *losses), RECIPE, look).outcome == outcome


def test_other_items_are_not_compared(store, scored):
    trees = measured(scored, 0.0) | {look_name(1): scored(2)}
    with pytest.raises(NotPaired):
        evidence.judge_looks(store, trees, RECIPE, 1)


@pytest.mark.parametrize(("lost", "outcome"), [(0.0, "accepted"), (0.5, "rejected")])
def test_confirmed_on_fresh_items_only(store, scored, lost, outcome):
    trees = measured(scored, 0.0)
    trees[look_name(CONFIRMATION, baseline=True)] = scored(CONFIRMATION)
    trees[look_name(CONFIRMATION)] = scored(CONFIRMATION, lost, 1.01)
    accepted = evidence.judge_looks(store, trees, RECIPE, 1)
    assert evidence.confirm(store, trees, RECIPE, accepted, 5).outcome == outcome


def test_names_of_looks():
    names = [look_name(look, baseline) for look in range(1, CONFIRMATION + 1) for baseline in (True, False)]
    names += [look_name(look, kv_cache="none") for look in range(1, CONFIRMATION + 1)]
    assert len(set(names)) == 3 * (LOOKS + 1)


def test_the_kv_cache_is_judged_on_answers_of_its_own(store, scored):
    trees = measured(scored, 0.5, 0.5)
    trees |= {look_name(look, kv_cache="none"): scored(look, 0.0, 1.01) for look in (1, 2)}
    fresh = {look_name(CONFIRMATION, baseline=True): scored(CONFIRMATION)}
    fresh |= {look_name(CONFIRMATION, kv_cache="none"): scored(CONFIRMATION, 0.5)}
    assert evidence.judge_looks(store, trees, RECIPE, 2).outcome == "rejected"
    apart = evidence.judge_looks(store, trees, RECIPE, 2, kv_cache="none")
    assert apart.outcome == "accepted"
    assert evidence.confirm(store, trees | fresh, RECIPE, apart, 5, kv_cache="none").outcome == "rejected"


def test_written_and_read(store, scored):
    trees = measured(scored, 0.0)
    result = evidence.judge_looks(store, trees, RECIPE, 1)
    state = State(store=store.uri, goal="lower_latency", target="cpu", model=trees["look-1"], recipe=RECIPE)
    tree = evidence.write(store, state, result, trees["look-1"], trees)
    document = evidence.read(store, tree)
    assert {name: Tree.model_validate(value) for name, value in document["measured"].items()} == trees
    assert document["verdict"]["outcome"] == "accepted"
    assert (document["versions"], document["device"]) == (environment.versions(), environment.device())
    assert evidence.write(store, state, result, trees["look-1"], trees) == tree, "the same evidence"


def test_evidence_that_is_gone(store, scored):
    tree = scored(1)
    gone = tree.model_copy(update={"digest": "0" * 64, "uri": tree.uri.replace(tree.digest, "0" * 64)})
    with pytest.raises(StoreError, match="there is no tree"):
        evidence.read(store, gone)
