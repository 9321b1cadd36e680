import pytest
from verdicts import ACCEPT, ACCEPTED

from trimtab.base.errors import TrimtabError
from trimtab.catalog.goals import GOALS
from trimtab.judge import Measurements, Verdict, check_gain, gain

BEFORE = Measurements(
    bytes=1000, decode_tokens_per_second=50, throughput_tokens_per_second=200, max_context_tokens=4096
)
AFTER = Measurements(
    bytes=400, decode_tokens_per_second=60, throughput_tokens_per_second=190, max_context_tokens=8192
)


@pytest.mark.parametrize(
    "goal, value",
    [
        ("fit_larger_model", 0.6),
        ("lower_latency", 0.2),
        ("higher_throughput", -0.05),
        ("lower_cost", 1 - 200 / 190),  # of a token: a device gives 190 in the time of 200
        ("long_context", 1.0),
    ],
)
def test_gain(goal, value):
    assert gain(goal, BEFORE, AFTER) == pytest.approx(value)
    assert gain(goal, BEFORE, BEFORE) == 0
    verdict = check_gain(ACCEPTED, goal, ACCEPT, BEFORE, AFTER)
    assert verdict.gain == pytest.approx(value) and verdict.measurements == AFTER
    assert verdict.outcome == ("accepted" if value > 0 else "rejected")


@pytest.mark.parametrize(
    "goal, before, after, value",
    [
        # two devices that do 100 tokens/s, and one that does 90: 50 and 90 a device
        ("lower_latency", {"decode_tokens_per_second": 100}, {"decode_tokens_per_second": 90}, 0.8),
        ("higher_throughput", {"throughput_tokens_per_second": 100}, {"throughput_tokens_per_second": 45}, -0.1),
        ("lower_cost", {"throughput_tokens_per_second": 100}, {"throughput_tokens_per_second": 90}, 1 - 50 / 90),
        ("long_context", {"max_context_tokens": 8000}, {"max_context_tokens": 8000}, 1.0),
        ("long_context", {"max_context_tokens": 0}, {"max_context_tokens": 5}, 1.0),  # any is longer than none
        ("long_context", {"max_context_tokens": 0}, {"max_context_tokens": 0}, 0.0),
        ("fit_larger_model", {"bytes": 100}, {"bytes": 75}, 0.25),  # of an artifact, wherever it is served
    ],
)
def test_gain_is_that_of_a_device(goal, before, after, value):
    found = check_gain(ACCEPTED, goal, ACCEPT, Measurements(devices=2, **before), Measurements(**after))
    assert found.gain == pytest.approx(value)
    if value < 0:
        assert "-10.0% more throughput a device, on 1 instead of 2, less than" in found.reason


def test_every_goal_has_a_gain():
    assert all(gain(goal, BEFORE, BEFORE) == 0 for goal in GOALS)


def test_useless_is_rejected_with_a_sentence():
    verdict = check_gain(ACCEPTED, "higher_throughput", ACCEPT, BEFORE, AFTER)
    assert verdict.failure_class == "no_gain"
    assert verdict.reason == (
        "accurate but useless for higher_throughput: -5.0% more throughput, less than the 2.0% asked for"
    )


def test_a_rejected_verdict_keeps_its_reason():
    bad = Verdict(outcome="rejected", failure_class="accuracy", reason="bad")
    verdict = check_gain(bad, "higher_throughput", ACCEPT, BEFORE, AFTER)
    assert (verdict.failure_class, verdict.reason) == ("accuracy", "bad")
    assert verdict.gain == pytest.approx(-0.05)
    assert check_gain(bad, "lower_latency", ACCEPT, Measurements(), AFTER).gain is None


@pytest.mark.parametrize(
    "goal, before, after, words",
    [
        ("lower_latency", Measurements(), AFTER, "baseline's decode_tokens_per_second was not measured"),
        ("fit_larger_model", BEFORE, Measurements(), "candidate's bytes was not measured"),
        ("smaller", BEFORE, AFTER, "'smaller' is unknown"),
    ],
)
def test_no_gain_without_a_measurement(goal, before, after, words):
    with pytest.raises(TrimtabError, match=words):
        gain(goal, before, after)
    with pytest.raises(TrimtabError, match=words):
        check_gain(ACCEPTED, goal, ACCEPT, before, after)
