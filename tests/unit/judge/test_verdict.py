import json
import math

import pytest
from verdicts import ACCEPT, ACCEPTED, decide, pair

from trimtab.base.errors import TrimtabError
from trimtab.judge import (
    FAILURE_CLASSES,
    Measurements,
    NotPaired,
    Scores,
    Verdict,
    blame_kv_cache,
    check_gain,
    confirm,
    judge,
)


@pytest.mark.parametrize(
    "kwargs, outcome, failure_class, words",
    [
        ({}, "accepted", None, "recovery 1.000 (0.985 to 1.016) is at least 0.95 and perplexity ratio 1.03"),
        ({"lost": 200}, "rejected", "accuracy", "is below the limit 0.95"),
        ({"ratio": 1.2}, "rejected", "perplexity", "perplexity ratio 1.200 (1.195 to 1.205) is above"),
        ({"lost": 300, "ratio": 1.15}, "rejected", "accuracy", "recovery 0.654"),
        ({"lost": 100, "ratio": 2.0}, "rejected", "perplexity", "perplexity ratio 2.0"),
        ({"lost": 55}, "indeterminate", "accuracy", "1800 items are too few to tell: recovery 0.957"),
        (
            {"ratio": 1.1},
            "indeterminate",
            "perplexity",
            "48 windows are too few to tell: perplexity ratio 1.100",
        ),
        ({"lost": 55, "ratio": 1.1}, "indeterminate", "accuracy", "1800 items and 48 windows are too few"),
        ({"lost": 55, "ratio": 1.2}, "rejected", "perplexity", "is above the limit 1.1"),
    ],
)
def test_the_last_look(kwargs, outcome, failure_class, words):
    verdict = decide(**kwargs)
    assert (verdict.outcome, verdict.failure_class) == (outcome, failure_class)
    assert words in verdict.reason
    assert (verdict.looks, verdict.items, verdict.windows) == (3, 1800, 48)
    assert failure_class is None or failure_class in FAILURE_CLASSES
    assert Verdict.parse(verdict.to_json()) == verdict


def test_the_baseline_stands_beside_it_on_the_same_items():
    """1,800 items of which it has 80 % right, and the candidate 100 fewer."""
    verdict = decide(lost=120, gained=20, ratio=1.05)
    assert (verdict.beside.accuracy.estimate, verdict.accuracy.estimate) == (0.8, (1440 - 100) / 1800)
    assert verdict.perplexity / verdict.beside.perplexity == pytest.approx(verdict.perplexity_ratio.estimate)
    before, after = Measurements(bytes=200), Measurements(bytes=100)
    told = check_gain(verdict, "fit_larger_model", ACCEPT, before, after).beside
    assert told == verdict.beside.model_copy(update={"measurements": before})


def test_too_few_items_ask_for_more():
    verdict = decide(look=1, n=360, lost=8, gained=4, windows=16)
    assert (verdict.outcome, verdict.failure_class) == ("indeterminate", None)
    assert verdict.reason.startswith("360 items are too few to tell") and verdict.reason.endswith(
        "more are needed"
    )


def test_intervals_have_the_confidence_of_their_look():
    first, last = decide(look=1), decide(look=3)
    assert first.recovery.low < last.recovery.low and last.recovery.high < first.recovery.high
    only = judge(**dict(zip(("baseline", "candidate"), pair(), strict=True)), accept=ACCEPT, look=1, looks=1)
    assert last.recovery.low < only.recovery.low


def test_a_baseline_at_chance_calls_for_other_tasks():
    baseline, candidate = pair(accuracy=0.36)
    verdict = judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=1)
    assert (verdict.outcome, verdict.failure_class, verdict.recovery) == ("indeterminate", None, None)
    assert "not above chance" in verdict.reason and "choose tasks that the model can do" in verdict.reason
    assert judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=3).failure_class == "accuracy"


def test_one_window_decides_nothing_and_survives_json():
    verdict = decide(windows=1)
    assert (verdict.outcome, verdict.failure_class) == ("indeterminate", "perplexity")
    assert verdict.perplexity_ratio.high == math.inf
    json.loads(verdict.to_json(), parse_constant=pytest.fail)
    assert Verdict.parse(verdict.to_json()) == verdict


def test_a_likelihood_that_is_no_number_is_degenerate():
    baseline, candidate = pair()
    candidate.nll[3] = math.nan
    verdict = judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=1)
    assert (verdict.outcome, verdict.failure_class) == ("rejected", "degenerate_output")
    assert "1 of 48 windows" in verdict.reason and verdict.perplexity is None
    baseline.nll[3] = math.inf
    with pytest.raises(TrimtabError, match="baseline"):
        judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=1)


@pytest.mark.parametrize("field", ["item_ids", "chance", "window_ids", "tokens"])
def test_other_items_are_an_error(field):
    baseline, candidate = pair()
    getattr(candidate, field)[5] /= 2 if field in ("chance", "tokens") else 1
    if field.endswith("ids"):
        getattr(candidate, field)[5] = 6
    with pytest.raises(NotPaired, match=f"{field} differ .first at position 5"):
        judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=1)


def test_fewer_items_are_an_error():
    with pytest.raises(NotPaired, match="lengths 1800 and 360"):
        judge(baseline=pair()[0], candidate=pair(n=360)[1], accept=ACCEPT, look=1)


@pytest.mark.parametrize("look", [0, 4])
def test_a_look_that_was_not_planned_is_an_error(look):
    with pytest.raises(TrimtabError, match="not one of 1 to 3"):
        decide(look=look)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"items": []}, "items have"),
        ({"items": [1.0, 2.0]}, "not in"),
        ({"items": [1.0, math.nan]}, "not in"),
        ({"chance": [0.5, 1.0]}, "chance"),
        ({"chance": [0.5]}, "items have"),
        ({"tokens": [0]}, "no tokens"),
        ({"nll": [1.0, 2.0]}, "windows have"),
    ],
)
def test_scores_are_checked(change, words):
    good = {"items": [1.0, 0.0], "chance": [0.5, 0.5], "nll": [9.0], "tokens": [3]}
    good |= {"item_ids": ["a", "b"], "window_ids": ["w"]}
    assert Scores(**good).perplexity == pytest.approx(math.exp(3))
    with pytest.raises(TrimtabError, match=words):
        Scores(**good | change)


@pytest.mark.parametrize(
    "kwargs, attempts, failure_class, words",
    [
        ({"lost": 4, "gained": 4}, 5, None, "good"),
        ({"lost": 13, "gained": 4}, 2, None, "good"),
        ({"lost": 13, "gained": 4}, 5, "accuracy", "is not shown to be at least 0.95"),
        ({"lost": 16, "gained": 4}, 2, "accuracy", "is below the limit 0.95"),
        ({"lost": 80, "gained": 4}, 1, "accuracy", "is below the limit 0.95"),
        ({"ratio": 1.2}, 5, "perplexity", "is above the limit 1.1"),
        ({"ratio": 1.099}, 5, "perplexity", "is not shown to be at most 1.1"),
        ({"lost": 13, "gained": 4, "ratio": 1.2}, 5, "perplexity", "is above the limit 1.1"),
        ({"accuracy": 0.35}, 5, "accuracy", "not above chance"),
    ],
)
def test_confirmation(kwargs, attempts, failure_class, words):
    baseline, candidate = pair(**{"n": 480, "lost": 4, "gained": 4, "windows": 12} | kwargs)
    verdict = confirm(ACCEPTED, baseline, candidate, ACCEPT, attempts=attempts)
    assert (verdict.confirmed, verdict.failure_class) == (failure_class is None, failure_class)
    assert verdict.outcome == ("rejected" if failure_class else "accepted")
    assert words in verdict.reason
    assert verdict.reason.startswith("not confirmed on fresh items: ") == bool(failure_class)
    assert verdict.recovery == ACCEPTED.recovery
    assert (verdict.confirmation.items, verdict.confirmation.windows) == (480, 12)
    assert verdict.confirmation.level == 1 - min(0.5, 1 / attempts)
    assert Verdict.parse(verdict.to_json()) == verdict


def test_confirmation_finds_degenerate_output():
    baseline, candidate = pair()
    candidate.nll[0] = math.inf
    assert confirm(ACCEPTED, baseline, candidate, ACCEPT).failure_class == "degenerate_output"


def test_only_an_acceptance_is_confirmed():
    with pytest.raises(TrimtabError, match="this one is rejected"):
        confirm(Verdict(outcome="rejected", reason="bad"), *pair(), ACCEPT)
    with pytest.raises(TrimtabError, match="at least 1"):
        confirm(ACCEPTED, *pair(), ACCEPT, attempts=0)


@pytest.mark.parametrize("fell", [{"lost": 200}, {"ratio": 1.2}, {"lost": 55}], ids=["accuracy", "perplexity", "open"])
def test_a_kv_cache_is_to_blame_if_the_export_passes_without_it(fell):
    result = decide(**fell)
    told = blame_kv_cache(result, "nvfp4", decide())
    assert (told.outcome, told.failure_class) == ("rejected", "kv_cache_accuracy")
    first, second = (f"perplexity ratio {v.perplexity_ratio.estimate:.3f} (" for v in (result, decide()))
    assert told.reason.startswith(f"the KV cache is to blame: {first}") and f"in nvfp4, {second}" in told.reason
    assert "in 16 bits, which is accepted" in told.reason and told.reason.endswith(result.reason)
    numbers = {"outcome", "failure_class", "reason"}
    assert told.model_dump(exclude=numbers) == result.model_dump(exclude=numbers), "the numbers are the export's"
    assert len(told.reason) < 300


@pytest.mark.parametrize(
    ("apart", "look", "words"),
    [
        ({"ratio": 1.15}, 3, "the KV cache is not to blame: in 16 bits perplexity ratio 1.150"),
        ({"lost": 55}, 1, "the KV cache is not shown to be to blame: in 16 bits 1800 items are too few to tell"),
    ],
)
def test_a_kv_cache_is_not_to_blame_if_the_export_fails_without_it(apart, look, words):
    result = decide(ratio=1.3)
    told = blame_kv_cache(result, "fp8", decide(look=look, **apart))
    assert (told.outcome, told.failure_class) == ("rejected", "perplexity")
    assert told.reason.startswith(f"{result.reason}; {words}") and "more are needed" not in told.reason
    assert told.model_copy(update={"reason": result.reason}) == result


def test_an_open_verdict_stays_open_if_the_kv_cache_is_not_to_blame():
    told = blame_kv_cache(decide(lost=55), "fp8", decide(lost=60))
    assert (told.outcome, told.failure_class) == ("indeterminate", "accuracy")


@pytest.mark.parametrize("other", ["degenerate_output", "no_gain", None])
def test_a_kv_cache_is_blamed_for_accuracy_alone(other):
    verdict = Verdict(outcome="rejected" if other else "accepted", failure_class=other, reason="for the test")
    with pytest.raises(TrimtabError, match="a KV cache is not to blame for"):
        blame_kv_cache(verdict, "fp8", decide())
