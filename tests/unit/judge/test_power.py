"""What a number of items can show, beside what it shows in simulated runs."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.judge.power import CHURN, MOST, Power, group, needed, probability
from trimtab.judge.statistics import paired_recovery

ALPHA = 0.05 * 4 / 7  # of the last of three looks


@pytest.mark.parametrize(
    ("items", "recovery", "accuracy"), [(400, 0.98, 0.8), (1000, 0.98, 0.7), (1000, 0.99, 0.5), (2000, 0.97, 0.8)]
)
def test_it_is_the_share_of_simulated_runs_that_pass(items, recovery, accuracy):
    chance, draw, passed, runs = 0.25, np.random.default_rng(1), 0, 250
    loss = (1 - recovery) * (accuracy - chance)
    for _ in range(runs):
        before = draw.random(items) < accuracy
        lost = before & (draw.random(items) < (loss + CHURN / 2) / accuracy)
        gained = ~before & (draw.random(items) < CHURN / 2 / (1 - accuracy))
        after = (before & ~lost) | gained
        found = paired_recovery(before, after, np.full(items, chance), 1 - 2 * ALPHA)
        passed += found.low >= 0.95
    # Three standard errors of 250 runs, and what a normal distribution errs by.
    assert probability(recovery, 0.95, accuracy, chance, items, ALPHA) == pytest.approx(passed / runs, abs=0.11)


def test_the_number_that_is_needed_is_the_least_that_does():
    found = needed(0.98, 0.95, 0.7, 0.25, ALPHA, 0.8)
    assert probability(0.98, 0.95, 0.7, 0.25, found, ALPHA) >= 0.8
    assert probability(0.98, 0.95, 0.7, 0.25, found - 1, ALPHA) < 0.8
    # As many again as there are a quarter of the distance to show.
    assert needed(0.965, 0.95, 0.7, 0.25, ALPHA, 0.8) > 3 * found
    assert needed(0.95, 0.95, 0.7, 0.25, ALPHA, 0.8) == MOST


def test_a_baseline_at_chance_shows_nothing():
    assert probability(1, 0.95, 0.25, 0.25, 10**6, ALPHA) == 0 and needed(1, 0.95, 0.25, 0.25, ALPHA, 0.1) == MOST


def told(items: int, fresh: int = 960, accuracy: float = 0.7) -> Power:
    about = {
        "task": "",
        "limit": 0.95,
        "recovery": None,
        "accuracy": accuracy,
        "chance": 0.25,
        "highest": accuracy + 0.02,
    }
    found = group(**about, items=items, fresh=fresh, alphas=(ALPHA, 0.2), wanted=0.8)
    return Power(wanted=0.8, groups=(found,))


def test_what_is_told():
    """A run of five attempts with 100 items in each look ended five times in "too few to tell"."""
    few, many = told(450, 300), told(2000)
    assert few.sentence.startswith(
        "with 450 items and 300 fresh ones an artifact that truly keeps 0.98 is shown to keep 0.95"
    )
    assert few.groups[0].shown < 0.4 and f"; {few.groups[0].needed:,} and " in few.sentence
    assert "would do" in few.sentence and few.decides
    assert many.groups[0].shown > 0.8 and "would do" not in many.sentence and many.decides
    assert not told(60, 30).decides
    hopeless = told(2000, accuracy=0.2)
    assert not hopeless.decides and hopeless.sentence.endswith("choose tasks that the model can do")
    assert Power.parse(few.to_json()) == few
