"""Critical tasks block alone, supporting ones are pooled, advisory ones are shown, required ones must be there."""

from __future__ import annotations

import pytest
from paired import pair

from trimtab.base.errors import InputError
from trimtab.judge import confirm, judge
from trimtab.recipe import Acceptance


def verdict(accept: dict, look: int = 3, **lost: int):
    baseline, candidate = pair(**lost)
    return judge(baseline=baseline, candidate=candidate, accept=Acceptance.parse(accept), look=look)


def test_what_the_pool_hides_a_critical_task_shows():
    """60 of 480 right answers of one task among four are 0.82 of its ability and 0.95 of what all have together."""
    lost = {"math": 60, "a": 2, "b": 2, "c": 2}
    assert verdict({"min_recovery": 0.92}, **lost).outcome == "accepted"
    blocked = verdict({"min_recovery": 0.92, "critical": {"math": 0.9}}, **lost)
    assert (blocked.outcome, blocked.failure_class) == ("rejected", "accuracy")
    # 1 - 60 / (480 - 600 * 0.25)
    assert blocked.reason.startswith("recovery of math 0.818 (") and blocked.reason.endswith("is below the limit 0.9")
    # What is pooled are the others: 1 - 6 / (3 * 330).
    assert blocked.recovery.estimate == pytest.approx(1 - 6 / 990) and blocked.items == 1800


def test_each_critical_task_must_be_shown():
    lost = {"math": 0, "law": 31, "a": 0}
    accept = {"critical": {"math": 0.95, "l*": 0.9}}
    found = verdict(accept, **lost)
    assert (found.outcome, found.failure_class) == ("indeterminate", "accuracy")
    assert found.reason.startswith("600 items of law are too few to tell: recovery of law 0.906 (")
    assert verdict(accept, look=1, **lost).reason.endswith("is not shown to be at least 0.9; more are needed")
    accepted = verdict(accept, math=0, law=0, a=0)
    assert accepted.outcome == "accepted" and "recovery of law 1.000 (" in accepted.reason


def test_an_advisory_task_decides_nothing_and_is_on_the_card():
    found = verdict({"advisory": ["odd"]}, a=0, odd=300)
    assert found.outcome == "accepted" and found.items == 600 and found.recovery.estimate == 1
    card = {task.task: task for task in found.damage.tasks}
    assert (card["odd"].tier, card["odd"].lost, card["odd"].gained) == ("advisory", 300, 0)
    assert card["odd"].recovery.estimate == pytest.approx(1 - 300 / 330) and found.damage.worst == "a"


@pytest.mark.parametrize("accept", [{"required": ["gsm8k"]}, {"critical": {"gsm8k": 0.9}}])
def test_a_required_task_that_was_not_measured_is_never_passed(accept):
    baseline, candidate = pair(a=0)
    found = judge(baseline=baseline, candidate=candidate, accept=Acceptance.parse(accept), look=3)
    assert (found.outcome, found.failure_class) == ("indeterminate", "accuracy")
    assert found.reason == "'gsm8k' is required and was not measured"
    good = judge(baseline=baseline, candidate=candidate, accept=Acceptance(), look=3)
    fresh = confirm(good, baseline, candidate, Acceptance.parse(accept))
    assert (fresh.outcome, fresh.confirmed) == ("rejected", False)
    assert fresh.reason == "not confirmed on fresh items: 'gsm8k' is required and was not measured"


def test_a_critical_task_is_confirmed_on_fresh_items_too():
    accept = Acceptance.parse({"critical": {"math": 0.9}})
    good = judge(**dict(zip(("baseline", "candidate"), pair(math=0, a=0), strict=True)), accept=accept, look=3)
    assert confirm(good, *pair(math=10, a=0), accept).confirmed
    failed = confirm(good, *pair(math=100, a=0), accept)
    assert (failed.outcome, failed.failure_class) == ("rejected", "accuracy")
    assert "recovery of math 0.697" in failed.reason and failed.confirmation.recovery.estimate == 1


def test_a_critical_task_that_the_model_cannot_do_stays_open_and_says_so():
    found = verdict({"critical": {"guessed": 0.9}}, guessed=0, a=0)
    assert (found.outcome, found.failure_class) == ("indeterminate", "accuracy")
    assert found.reason.startswith("guessed: the baseline is not above chance on these 600 items (25.0% against 25.0%)")
    assert next(task for task in found.damage.tasks if task.task == "guessed").recovery is None
    # What fails elsewhere is a rejection all the same.
    assert verdict({"critical": {"guessed": 0.9}}, guessed=0, a=200).outcome == "rejected"


def test_critical_tasks_alone_are_pooled_with_each_other():
    found = verdict({"critical": {"a": 0.8, "b": 0.8}}, a=60, b=0)
    assert found.items == 1200 and found.recovery.estimate == pytest.approx(1 - 60 / 660)
    assert found.reason.startswith("recovery 0.909") and found.outcome == "rejected"


def test_names_have_wildcards_and_the_last_that_matches_counts():
    accept = Acceptance.parse({"critical": {"mmlu_*": 0.9, "mmlu_law": 0.8}, "advisory": ["x*"]})
    assert [accept.limit(task) for task in ("mmlu_law", "mmlu_art", "gsm8k")] == [0.8, 0.9, None]
    assert [accept.tier(task) for task in ("mmlu_law", "xnli", "gsm8k")] == ["critical", "advisory", "supporting"]
    assert accept.missing(["mmlu_art"]) == ["mmlu_law"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"critical": {"a": 0.9}, "advisory": ["a"]}, "has 'a' in critical and in advisory; name it in one of the two"),
        ({"critical": {"a": 1.5}}, "critical.a: 1.5"),
        ({"required": [""]}, "has a task without a name in required; write the name of a task, such as gsm8k"),
    ],
)
def test_bad_tiers_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Acceptance.parse(given)


def test_recipes_from_before_tiers_are_what_they_were():
    assert set(Acceptance().model_dump()) == {"min_recovery", "max_perplexity_ratio", "confidence", "min_gain"}
    said = Acceptance.parse({"critical": {"a": 0.9}})
    assert Acceptance.parse(said.to_json()) == said
