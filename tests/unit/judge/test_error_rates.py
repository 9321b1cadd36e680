"""How often a verdict errs, of candidates drawn at the limits and of ones as good as the baseline."""

import math

import numpy as np
import pytest
from verdicts import ACCEPT, ACCEPTED, CHANCE, scores

from trimtab.judge import Scores, confirm, judge

ITEMS, WINDOWS = (360, 840, 1800), (16, 32, 48)


def simulated(rng, recovery, ratio, discordant, n, m, heavy=False, accuracy=0.8):
    """Draws a baseline and a candidate with this true recovery and perplexity ratio."""
    net = (1 - recovery) * (accuracy - CHANCE)
    lost, gained = (discordant + net) / 2, (discordant - net) / 2
    cell = rng.choice(4, n, p=[accuracy - lost, lost, gained, 1 - accuracy - gained])
    nll = rng.normal(2.5, 0.4, m) * 256
    noise = rng.gamma(4, 0.01, m) - 0.04 if heavy else rng.normal(0, 0.02, m)
    return scores(cell < 2, nll), scores(cell % 2 == 0, nll + (math.log(ratio) + noise) * 256)


def first(data, n, m):
    return Scores(
        data.items[:n], data.chance[:n], data.nll[:m], data.tokens[:m], data.item_ids[:n], np.arange(m)
    )


def three_looks(baseline, candidate):
    for look, (n, m) in enumerate(zip(ITEMS, WINDOWS, strict=True), start=1):
        verdict = judge(
            baseline=first(baseline, n, m), candidate=first(candidate, n, m), accept=ACCEPT, look=look
        )
        if verdict.outcome != "indeterminate":
            break
    return verdict


def at_most(count, runs, p):
    return count / runs <= p + 3 * math.sqrt(p * (1 - p) / runs)


@pytest.mark.parametrize(
    "recovery, ratio, discordant, heavy",
    [(0.95, 1.02, 0.03, False), (0.95, 1.02, 0.06, False), (1.0, 1.1, 0.03, False), (1.0, 1.1, 0.03, True)],
)
def test_false_acceptances_stay_within_alpha(recovery, ratio, discordant, heavy):
    rng, runs, accepted, rejected = np.random.default_rng(7), 2000, 0, 0
    for _ in range(runs):
        outcome = three_looks(
            *simulated(rng, recovery, ratio, discordant, ITEMS[-1], WINDOWS[-1], heavy)
        ).outcome
        accepted += outcome == "accepted"
        rejected += outcome == "rejected"
    print(f"accepted {accepted / runs:.4f}, rejected {rejected / runs:.4f}")
    # Skewed windows make the t interval's upper end err a little more often than nominal.
    assert at_most(accepted, runs, 0.06 if heavy else 0.05)
    assert at_most(rejected, runs, 0.1)


@pytest.mark.parametrize("discordant, power", [(0.03, 0.98), (0.06, 0.94)])
def test_an_equal_candidate_is_accepted(discordant, power):
    rng, runs = np.random.default_rng(8), 500
    looks = [
        (verdict.outcome == "accepted") * verdict.looks
        for verdict in (three_looks(*simulated(rng, 1.0, 1.02, discordant, 1800, 48)) for _ in range(runs))
    ]
    print([sum(0 < x <= look for x in looks) / runs for look in (1, 2, 3)])
    assert sum(x > 0 for x in looks) / runs >= power


def test_a_run_of_five_attempts_stays_within_alpha():
    # Five candidates exactly at the limit of recovery, tried until one is released.
    rng, runs, attempts, released, accepted = np.random.default_rng(9), 1500, 5, 0, 0
    for _ in range(runs):
        for _ in range(attempts):
            verdict = three_looks(*simulated(rng, 0.95, 1.02, 0.04, ITEMS[-1], WINDOWS[-1]))
            if verdict.outcome != "accepted":
                continue
            accepted += 1
            fresh = simulated(rng, 0.95, 1.02, 0.04, 480, 12)
            if confirm(verdict, *fresh, ACCEPT, attempts=attempts).confirmed:
                released += 1
                break
    print(f"released {released / runs:.4f}; accepted an attempt {accepted / runs / attempts:.4f}")
    assert accepted > 0 and at_most(released, runs, 0.05)


def test_confirmation_keeps_an_equal_candidate():
    rng, runs = np.random.default_rng(10), 500
    kept = sum(
        confirm(ACCEPTED, *simulated(rng, 1.0, 1.02, 0.04, 480, 12), ACCEPT, attempts=5).confirmed
        for _ in range(runs)
    )
    print(f"confirmed {kept / runs:.3f}")
    assert kept / runs >= 0.9
