"""How many items a run draws, by what its baseline scored."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.base.errors import InputError
from trimtab.judge import Scores
from trimtab.planning import drawing
from trimtab.planning.dealing import Deal, deal
from trimtab.recipe import Acceptance
from trimtab.recipe.evaluation import Evaluation

SIZES = {"math": 3000, "law": 3000, "tiny": 90}
FEW = Evaluation(items=(60, 60, 120), confirm_items=80)


def answered(found: Deal, **share: float) -> Scores:
    """What a baseline scores at the first look, of which `share` is right by task."""
    tasks = [task for task, count in found.looks[0].items() for _ in range(count)]
    right = np.concatenate([np.arange(n) < round(share.get(task, 0.8) * n) for task, n in found.looks[0].items()])
    n = len(tasks)
    return Scores(right, np.full(n, 0.25), [9.0, 9.0], [3, 3], np.arange(n), [0, 1], tasks)


def counts(found: Deal) -> list[int]:
    return [sum(part.values()) for part in (*found.looks, found.confirmation)]


def drawn(found: Deal, scores: Scores, evaluation: Evaluation, accept: Acceptance) -> Deal:
    return drawing.enlarged(found, drawing.measured(scores, found, evaluation, accept, 5), accept, 5)


def test_the_last_look_and_the_confirmation_draw_what_is_missing():
    accept = Acceptance()
    before = deal(SIZES, FEW, accept, 5)
    power = drawing.measured(answered(before), before, FEW, accept, 5)
    after = drawing.enlarged(before, power, accept, 5)
    assert counts(before) == [60, 60, 120, 80] and counts(after)[:2] == [60, 60], "the first looks stay what they are"
    assert before.look(1) == after.look(1) and before.look(2) == after.look(2)
    assert power.groups[0].shown < 0.8
    again = drawing.measured(answered(before), after, FEW, accept, 5).groups[0]
    assert again.shown >= 0.8 and (again.items, again.fresh) == (power.groups[0].needed, power.groups[0].needed_fresh)
    assert drawing.enlarged(after, drawing.measured(answered(before), after, FEW, accept, 5), accept, 5) == after
    items = [
        {(task, n) for task, (a, b) in part.items() for n in range(a, b)}
        for part in (*(after.look(n) for n in (1, 2, 3)), *(after.confirm(n) for n in range(min(after.fresh.values()))))
    ]
    assert len(set().union(*items)) == sum(map(len, items)), "no item is asked twice"
    assert Deal.parse(after.to_json()) == after


def test_tasks_that_have_no_more_give_all_and_the_run_is_told():
    accept, sizes = Acceptance(), {"tiny": 400}
    before = deal(sizes, FEW, accept, 5)
    after = drawn(before, answered(before), FEW, accept)
    assert sum(counts(after)) == 400
    power = drawing.measured(answered(before), after, FEW, accept, 5)
    assert power.groups[0].shown < 0.8 and "would do for 0.8" in power.sentence


def test_what_is_asked_suffices_for_the_suite():
    """2,000 items of trimtab's own tasks, as the demo's model answers them: 0.825 of them are right."""
    suite = {f"trimtab_{n}": 540 for n in range(10)}
    before = deal(suite, Evaluation(), Acceptance(), 5)
    scores = answered(before, **dict.fromkeys(suite, 0.825))
    assert drawn(before, scores, Evaluation(), Acceptance()) == before


def test_a_critical_task_draws_for_its_own_limit():
    accept = Acceptance.parse({"min_recovery": 0.8, "critical": {"math": 0.96}})
    dealt = deal(SIZES, FEW, accept, 5)
    # z^2 (1 / (0.5 * 0.04) - 1) at a one-sided 0.0286, so that an unchanged model could be shown to keep it.
    assert sum(look["math"] for look in dealt.looks) == 178
    power = drawing.measured(answered(dealt), dealt, FEW, accept, 5)
    assert {group.task for group in power.groups} == {"", "math"} and power.least.task == "math"
    after = drawing.enlarged(dealt, power, accept, 5)
    math = next(g for g in drawing.measured(answered(dealt), after, FEW, accept, 5).groups if g.task)
    assert math.items == next(g for g in power.groups if g.task).needed and "items of math and" in power.sentence


def test_a_model_at_chance_is_known_to_decide_nothing():
    accept, found = Acceptance(), deal(SIZES, Evaluation(), Acceptance(), 5)
    power = drawing.measured(answered(found, math=0.2, law=0.2, tiny=0.2), found, Evaluation(), accept, 5)
    assert not power.decides and power.sentence.endswith(
        "no number of items would do: choose tasks that the model can do"
    )
    assert drawing.enlarged(found, power, accept, 5) == found


@pytest.mark.parametrize(
    ("accept", "message"),
    [
        ({"required": ["gsm8k"]}, "accept.required: 'gsm8k' is no task of the evaluation; valid: law, math, tiny"),
        ({"critical": {"maths": 0.9}}, "accept.critical: 'maths' is no task of the evaluation; write 'math'"),
        ({"critical": {"math": 1}}, "accept.critical: 1 of 'math' is shown by no number of items; write less"),
        ({"advisory": ["*"]}, "accept.advisory: leaves no task to be judged"),
        ({"critical": {"tiny": 0.95}}, "accept.critical: 'tiny' has 90 items, and with fewer than 170 for the looks"),
    ],
)
def test_tiers_that_could_not_end_well_are_refused_when_the_run_is_planned(accept, message):
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        deal(SIZES, FEW, Acceptance.parse(accept), 5)
