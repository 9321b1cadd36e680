"""The ledger in the report, in Markdown and below the console's table."""

from __future__ import annotations

from runs import ACCEPTED, AWQ, BASELINE, INT4, RELEASED, state

from trimtab.judge import Beside, Measurements
from trimtab.recipe import Limits, Prices
from trimtab.report import advice, console_lines, costs, story, summary_html, summary_markdown

PRICES = Prices(gpu_hour=3.6, currency="EUR")
BEFORE = Measurements(bytes=1, throughput_tokens_per_second=1000)
AFTER = Measurements(bytes=1, throughput_tokens_per_second=2000)
PAID = ACCEPTED.model_copy(
    update={
        "verdict": ACCEPTED.verdict.model_copy(update={"measurements": AFTER, "beside": Beside(measurements=BEFORE)}),
        "seconds": {"quantize": 500.0, "validate": 1500.0},
        "cpu_seconds": {"quantize": 900.0, "validate": 1700.0},
    }
)
RUN = state(PAID, target="h100", prices=PRICES, baseline=BASELINE.model_copy(update={"seconds": {"validate": 1000.0}}))
SPENT = "The run took 0.833 GPU hours and 0.722 CPU hours, which is 3.00 EUR."
SAVED = (
    "A million tokens of answers, at the batch that was measured, takes 1.00 EUR unchanged and 0.50 EUR now; the run "
    "has paid for itself after 6 million tokens."
)


def test_what_it_cost_and_what_it_saves_is_told_everywhere():
    assert console_lines(RUN)[-2:] == [SPENT, SAVED]
    page, told = summary_html(RUN), summary_markdown(RUN)
    assert "What it cost</h2>" in page and SPENT in page and SAVED in page and SPENT in told and SAVED in told


def test_lines_by_attempt_and_by_stage():
    assert costs.rows(RUN) == [
        ("baseline", "0.278", "0.278", "0.000", "1.00 EUR"),
        ("1: mixed 6 bits", "0.556", "0.556", "0.722", "2.00 EUR"),
        ("all validate", "0.694", "0.694", "0.472", "2.50 EUR"),
        ("all quantize", "0.139", "0.139", "0.250", "0.50 EUR"),
        ("the whole run", "0.833", "0.833", "0.722", "3.00 EUR"),
    ]


def test_without_prices_there_are_hours():
    told = costs.savings_text(RUN.model_copy(update={"prices": None}))
    assert "takes 0.278 unchanged and 0.139 GPU hours now; the run has paid for itself after 6 million tokens" in told
    assert costs.rows(RELEASED)[-1][0] == "the whole run" and costs.rows(RELEASED)[-1][-1] == "–"
    assert "the cluster profile names no prices" in summary_html(RELEASED)


def test_a_run_that_the_budget_ended_says_so_and_what_to_write():
    seconds = {"seconds": {"validate": 3600.0}}
    run = state(
        INT4.model_copy(update=seconds), AWQ.model_copy(update=seconds), target="h100", limits=Limits(gpu_hours=2.5)
    )
    told = story.explanation(run)
    over = "the budget of 2.5 GPU hours ends the run: 2.02 are spent, and no attempt took less than 1.00"
    assert f"T{over[1:]}." in told and "2 of at most 5 attempts were made" in told[0]
    assert advice.next_steps(run)[0] == f"Write larger limits into the recipe, or a gentler recipe first: {over}."
    assert over[1:] in summary_html(run) and over[1:] in summary_markdown(run)
    assert not story.budget_text(RUN.model_copy(update={"limits": Limits(gpu_hours=0.1)})), "it ended with a release"


def test_numbers_for_people():
    assert [costs.tokens(n) for n in (12, 4500, 17_250_000, 3.2e9)] == [
        "12",
        "4.5 thousand",
        "17.2 million",
        "3.2 billion",
    ]
    assert [costs.money(n, "USD") for n in (0.0, 0.0123, 12.345, None)] == ["0.00 USD", "0.012 USD", "12.35 USD", "–"]
