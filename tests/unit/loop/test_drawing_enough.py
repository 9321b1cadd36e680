"""A run draws as many items as decide, once its baseline has answered and before its first attempt."""

from __future__ import annotations

import pytest
from releases import Run

from trimtab.judge import Verdict
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.evidence import look_name
from trimtab.loop.state import Brief, State
from trimtab.planning import drawing
from trimtab.recipe.evaluation import Evaluation

FEW = Evaluation(items=(150, 50, 100), confirm_items=200)


def measured(store, tmp_path, evaluation: Evaluation) -> tuple[Run, State]:
    """A run whose baseline alone was measured."""
    run = Run(store, tmp_path, evaluation=evaluation)
    scores = evidence.read_scores(store, [run.measured[look_name(1, baseline=True)]])
    plan = read_plan(store, run.state.plan)
    power = drawing.measured(scores, plan.dealt, evaluation, decisions.accepted_by(plan), 5)
    base = run.state.baseline
    verdict = Verdict(outcome="baseline", reason="unchanged", power=power)
    brief = Brief(recipe=base.recipe, verdict=verdict, engine=base.engine)
    return run, run.state.model_copy(update={"baseline": brief, "attempt": 0, "verdict": verdict, "trees": {}})


def test_the_plan_of_the_first_attempt_has_more_items(store, tmp_path):
    run, state = measured(store, tmp_path, FEW)
    assert state.baseline.verdict.power.groups[0].shown < 0.8
    state = load(save(state))
    begun = decisions.next_attempt(state)
    before, after = (read_plan(store, each.plan) for each in (state, begun))
    assert begun.plan != state.plan and after.dealt.look(1) == before.dealt.look(1)
    power = state.baseline.verdict.power.groups[0]
    assert sum(sum(look.values()) for look in after.dealt.looks) == power.needed > sum(FEW.items)
    assert sum(after.dealt.confirmation.values()) == power.needed_fresh
    assert after.model_copy(update={"dealt": before.dealt}) == before
    # The documents of the run go on from there, and later attempts keep what was drawn.
    again = load(save(begun))
    assert again.plan == begun.plan and again.baseline.verdict == state.baseline.verdict
    assert run.subject.evaluation_of(1, baseline=True).parameters["items"] == after.dealt.look(1)


@pytest.mark.parametrize("evaluation", [Evaluation(), FEW.model_copy(update={"power": 0.0})])
def test_it_stays_where_the_items_suffice_or_nobody_wants_more(store, tmp_path, evaluation):
    _, state = measured(store, tmp_path, evaluation)
    assert decisions.next_attempt(state).plan == state.plan
