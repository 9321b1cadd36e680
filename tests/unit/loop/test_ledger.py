"""What a run has spent and may still spend, and what its artifact saves."""

from __future__ import annotations

import math

import pytest
from runs import ACCEPTED, AWQ, BASELINE, INT4, state

from trimtab.base.errors import InputError
from trimtab.judge import Beside, Measurements
from trimtab.loop import decisions
from trimtab.loop.ledger import accelerators_of, exhausted, ledger, savings
from trimtab.loop.state import Brief
from trimtab.recipe import Limits, Prices, Recipe

PRICES = Prices(gpu_hour=3.6, cpu_hour=0.36, currency="EUR")
TWO = Recipe.parse({"engine": {"tensor_parallel_size": 2}, "quantize": {"format": "fp8"}})


def took(brief: Brief, **seconds: float) -> Brief:
    """The attempt with these seconds of its stages, each of which kept two cores busy."""
    return brief.model_copy(update={"seconds": seconds, "cpu_seconds": {name: 2 * s for name, s in seconds.items()}})


def test_each_stage_is_paid_by_the_devices_that_it_takes():
    run = state(
        took(INT4, quantize=100, engine=10, validate=200).model_copy(update={"recipe": TWO}),
        target="h100",
        baseline=took(BASELINE, validate=50),
        prices=PRICES,
    )
    lines = {(line.attempt, line.stage): line for line in ledger(run).lines}
    assert [lines[1, stage].gpu_seconds for stage in ("quantize", "engine", "validate")] == [100, 20, 400]
    assert lines[0, "validate"].gpu_seconds == 50 and lines[1, "quantize"].cpu_seconds == 200
    # 3.6 an hour is a thousandth a second; where a GPU is paid, the cores beside it are not.
    assert lines[1, "validate"].cost == pytest.approx(0.4)
    assert ledger(run).cost == pytest.approx(0.57) and ledger(run).gpu_hours == pytest.approx(570 / 3600)
    assert ledger(run).of(1).gpu_hours == pytest.approx(520 / 3600)


def test_on_a_processor_busy_cores_are_paid_and_what_was_found_costs_nothing():
    found = took(INT4, quantize=100, validate=200).model_copy(update={"seconds": {"quantize": 0.0, "validate": 200}})
    run = state(found, baseline=took(BASELINE, validate=50), prices=PRICES)
    assert ledger(run).gpu_hours == 0 and ledger(run).cpu_hours == pytest.approx(500 / 3600)
    assert ledger(run).cost == pytest.approx(0.05)
    assert ledger(run.model_copy(update={"prices": None})).cost is None


def test_what_takes_accelerators():
    trained = Recipe.parse({"prune": {"method": "depth", "blocks": 1}, "distill": {"tokens": 10**6, "processes": 4,
                            "batch_size": 8}})  # fmt: skip
    assert accelerators_of("distill", trained, "h100") == 4 and accelerators_of("prune", trained, "h100") == 1
    assert accelerators_of("validate", trained, "h100", TWO) == 2 and accelerators_of("fetch", TWO, "h100") == 0
    assert accelerators_of("engine", TWO, "cpu") == 0


def measured(throughput: float, devices: int = 1, cores: int = 0) -> Measurements:
    return Measurements(bytes=1, throughput_tokens_per_second=throughput, devices=devices, cores=cores)


def accepted(before: Measurements, after: Measurements, **seconds: float) -> Brief:
    verdict = ACCEPTED.verdict.model_copy(update={"measurements": after, "beside": Beside(measurements=before)})
    return took(ACCEPTED.model_copy(update={"verdict": verdict}), **seconds)


def test_after_how_many_tokens_the_run_has_paid_for_itself():
    """1,000 tokens a second of one GPU are 1,000 s a million, a thousandth each; 2,000 are half of it."""
    last = accepted(measured(1000), measured(2000), validate=2000)
    run = state(last, target="h100", baseline=took(BASELINE, validate=1000), prices=PRICES)
    saved = savings(run, last)
    assert (saved.before_cost, saved.after_cost) == (pytest.approx(1.0), pytest.approx(0.5))
    assert saved.tokens_to_pay == pytest.approx(6e6)  # 3 spent, 0.5 saved a million
    without = savings(run.model_copy(update={"prices": None}), last)
    assert without.before_cost is None and without.tokens_to_pay == pytest.approx(6e6), "hours pay for hours"


def test_devices_and_cores_count():
    last = accepted(measured(1000, devices=2), measured(1500), validate=10)
    assert savings(state(last, target="h100"), last).before_hours == pytest.approx(2000 / 3600)
    last = accepted(measured(100, cores=4), measured(200, cores=4), validate=10)
    assert savings(state(last), last).after_hours == pytest.approx(4 * 5000 / 3600)


def test_what_saves_nothing_never_pays():
    last = accepted(measured(1000), measured(900), validate=10)
    assert math.isinf(savings(state(last, target="h100"), last).tokens_to_pay)
    assert savings(state(INT4), INT4.model_copy(update={"verdict": BASELINE.verdict.model_copy(
        update={"measurements": Measurements()})})) is None  # fmt: skip


# --- the budget -----------------------------------------------------------------------------------------------

HALF_AN_HOUR = took(INT4, validate=1800)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ""),
        ({"gpu_hours": 3}, ""),
        (
            {"gpu_hours": 1.9},
            "the budget of 1.9 GPU hours ends the run: 1.50 is spent, and no attempt took less than 0.50",
        ),
        ({"gpu_hours": 1}, "the budget of 1 GPU hours ends the run: 1.50 is spent"),
        (
            {"cpu_hours": 3.5},
            "the budget of 3.5 CPU hours ends the run: 3.00 are spent, and no attempt took less than 1.00",
        ),
        ({"cost": 7.5}, ""),
        ({"cost": 5.5}, "the budget of 5.5 EUR ends the run: 5.40 are spent, and no attempt took less than 1.80"),
    ],
)
def test_a_budget_ends_the_run_before_it_is_overdrawn(limits, expected):
    run = state(
        HALF_AN_HOUR, took(AWQ, validate=1800), target="h100", baseline=took(BASELINE, validate=1800), prices=PRICES,
        limits=Limits(**limits),
    )  # fmt: skip
    assert exhausted(run) == expected
    if expected:
        assert decisions.decide(run) == "stop" and decisions.next_attempt(run) is run


def test_a_limit_of_money_needs_prices():
    wanted = Recipe.parse({"limits": {"cost": 100}})
    with pytest.raises(
        InputError, match="limits.cost: 100 needs prices; write prices: {gpu_hour: 2.5} into the cluster's"
    ):
        decisions.check_limits(wanted, None)
    decisions.check_limits(wanted, PRICES)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Limits, {"gpu_hour": 4}, "gpu_hour.*write 'gpu_hours'"),
        (Limits, {"gpu_hours": 0}, "gpu_hours: 0 should be greater than 0"),
        (Prices, {}, "has neither gpu_hour nor cpu_hour; write such as"),
        (Prices, {"gpu_hour": -1}, "gpu_hour: -1 should be greater than or equal to 0"),
    ],
)
def test_bad_input(kind, given, message):
    with pytest.raises(InputError, match=message):
        kind.parse(given)


def test_a_budget_is_no_part_of_what_an_attempt_is():
    plain = Recipe.parse({"quantize": {"format": "fp8"}})
    assert plain.model_copy(update={"limits": Limits(gpu_hours=4)}).digest == plain.digest
