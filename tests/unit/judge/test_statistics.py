import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.judge.statistics import (
    BaselineAtChance,
    Interval,
    mcnemar,
    normal_quantile,
    paired_perplexity_ratio,
    paired_recovery,
    split_alpha,
    t_quantile,
    wilson,
)


def paired(both, lost, gained, neither):
    """Returns baseline and candidate scores with these counts."""
    counts = [both, lost, gained, neither]
    return np.repeat([1.0, 1, 0, 0], counts), np.repeat([1.0, 0, 1, 0], counts)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9, 0.975, 0.99286, 0.9995])
def test_quantiles_agree_with_scipy(p):
    assert normal_quantile(p) == pytest.approx(stats.norm.ppf(p), abs=1e-9)
    for df in [1, 2, 3, 4, 5, 6, 15, 31, 47, 100, 199, 200, 201, 1000]:
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("p, df", [(0.0, 5), (1.0, 5), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(p, df):
    with pytest.raises(ValueError, match="t quantile"):
        t_quantile(p, df)


@pytest.mark.parametrize("successes, n", [(0, 10), (1, 10), (10, 10), (81, 263), (15, 148), (1700, 1800)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    interval = wilson(successes, n, confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_agrees_with_newcombe():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, 0.2553 to 0.3662.
    interval = wilson(81, 263, 0.95)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_recovery_agrees_with_tango_where_the_baseline_is_always_right():
    # With a baseline of 1 and chance of 0 on all items, recovery is the candidate's accuracy, and the score
    # interval is Wilson's.
    interval = paired_recovery(*paired(90, 10, 0, 0), np.zeros(100), 0.95)
    expected = wilson(90, 100, 0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_recovery_is_corrected_for_chance():
    baseline, candidate = paired(700, 100, 50, 150)
    interval = paired_recovery(baseline, candidate, np.full(1000, 0.25), 0.95)
    assert interval.estimate == pytest.approx((0.75 - 0.25) / (0.8 - 0.25))
    assert interval.low < interval.estimate < interval.high
    uncorrected = paired_recovery(baseline, candidate, np.zeros(1000), 0.95)
    assert uncorrected.estimate == pytest.approx(0.75 / 0.8)


def test_recovery_is_near_fieller_with_many_items():
    baseline, candidate = paired(14000, 2000, 1500, 2500)
    chance, z, n = np.full(20000, 0.35), stats.norm.ppf(0.975), 20000
    x, y = baseline - chance, candidate - chance
    (vx, cov), (_, vy) = np.cov(x, y) / n
    mx, my = x.mean(), y.mean()
    a, b, c = mx**2 - z**2 * vx, mx * my - z**2 * cov, my**2 - z**2 * vy
    root = math.sqrt(b * b - a * c)
    interval = paired_recovery(baseline, candidate, chance, 0.95)
    assert (interval.low, interval.high) == pytest.approx(((b - root) / a, (b + root) / a), abs=2e-4)


def test_pairing_narrows_the_interval():
    chance = np.full(400, 0.35)
    close = paired_recovery(*paired(310, 10, 10, 70), chance, 0.95)
    apart = paired_recovery(*paired(260, 60, 60, 20), chance, 0.95)
    assert close.estimate == pytest.approx(1) and apart.estimate == pytest.approx(1)
    assert close.high - close.low < (apart.high - apart.low) / 2


def test_no_discordant_pair_is_no_certainty():
    # At a loss of z^2 / (n + z^2) of the items n answers without a loss are just possible (the score
    # interval's rule of three); above chance there are 0.45 a mean item.
    for n in (100, 360, 1800):
        same = paired(n * 4 // 5, 0, 0, n // 5)
        interval = paired_recovery(*same, np.full(n, 0.35), 0.95)
        z = stats.norm.ppf(0.975)
        assert interval.estimate == 1
        assert 1 - interval.low == pytest.approx(z**2 / (n + z**2) / 0.45, rel=0.1)
        assert interval.high > 1 + 0.5 * z**2 / n
    both_perfect = paired_recovery(np.ones(100), np.ones(100), np.full(100, 0.5), 0.95)
    assert both_perfect.low < 0.95 and both_perfect.high == 1


def test_recovery_takes_scores_between_zero_and_one():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(0.5, 1, 500)
    candidate = np.clip(baseline - rng.uniform(0, 0.1, 500), 0, 1)
    interval = paired_recovery(baseline, candidate, np.zeros(500), 0.95)
    assert interval.low < candidate.sum() / baseline.sum() < interval.high


@pytest.mark.parametrize("right", [0, 35, 36])
def test_a_baseline_at_chance_is_said_to_be_so(right):
    scores = np.repeat([1.0, 0.0], [right, 100 - right])
    with pytest.raises(BaselineAtChance, match="not above chance on these 100 items"):
        paired_recovery(scores, scores, np.full(100, 0.35), 0.95)


def test_no_items_are_at_chance():
    with pytest.raises(BaselineAtChance):
        paired_recovery([], [], [], 0.95)


@given(st.tuples(*[st.integers(0, 200)] * 4), st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.5, 0.98]))
def test_recovery_is_inside_its_interval(counts, chance, confidence):
    baseline, candidate = paired(*counts)
    h = np.full(len(baseline), chance)
    try:
        interval = paired_recovery(baseline, candidate, h, confidence)
    except BaselineAtChance:
        return
    assert interval.low <= interval.estimate + 1e-9 and interval.estimate <= interval.high + 1e-9
    wider = paired_recovery(baseline, candidate, h, confidence - 0.1)
    assert interval.low <= wider.low + 1e-9 and wider.high <= interval.high + 1e-9


@pytest.mark.parametrize("n", [100, 360, 2000])
@pytest.mark.parametrize("accuracy", [0.75, 0.9])
def test_recovery_covers(n, accuracy):
    # The lower end accepts: it must not err more often than nominal. The table in the module has the rest.
    rng, runs, true, nominal = np.random.default_rng(n), 3000, 0.95, 0.05
    chance = rng.choice([0.25, 0.5], n)
    net = (1 - true) * (accuracy - chance.mean())
    rates = [accuracy - net - 0.02, net + 0.02, 0.02, 1 - accuracy - 0.02]
    low = high = 0
    for row in rng.choice(4, (runs, n), p=rates):
        interval = paired_recovery((row < 2) * 1.0, (row % 2 == 0) * 1.0, chance, 1 - 2 * nominal)
        low += interval.low > true
        high += interval.high < true
    error = math.sqrt(nominal * (1 - nominal) / runs)
    assert low / runs <= nominal + 3 * error
    assert high / runs <= 1.4 * nominal + 3 * error


def test_perplexity_ratio_is_the_paired_t_interval():
    rng = np.random.default_rng(1)
    tokens = np.full(20, 256)
    baseline = rng.normal(2.5, 0.5, 20) * 256
    candidate = baseline + rng.normal(0.05, 0.02, 20) * 256
    expected = stats.ttest_rel(candidate / 256, baseline / 256).confidence_interval(0.95)
    interval = paired_perplexity_ratio(baseline, candidate, tokens, 0.95)
    assert (math.log(interval.low), math.log(interval.high)) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )
    assert interval.estimate == pytest.approx(
        math.exp(candidate.sum() / (256 * 20)) / math.exp(baseline.sum() / (256 * 20))
    )


def test_perplexity_ratio_weighs_windows_by_tokens():
    interval = paired_perplexity_ratio([0, 0], [30, 10], [100, 300], 0.95)
    assert math.log(interval.estimate) == pytest.approx(40 / 400)


def test_one_window_bounds_nothing():
    interval = paired_perplexity_ratio([100], [110], [100], 0.95)
    assert (interval.low, interval.high) == (0, math.inf)
    assert interval.estimate == pytest.approx(math.exp(0.1))
    assert Interval.parse(interval.to_json()) == interval
    assert '"Infinity"' in interval.to_json()


def test_equal_differences_give_a_point():
    same = paired_perplexity_ratio([100, 120], [100, 120], [50, 50], 0.95)
    assert (same.low, same.estimate, same.high) == (1, 1, 1)


def test_a_wrecked_model_overflows_to_infinity():
    interval = paired_perplexity_ratio([0, 0], [1e6, 1e6], [10, 10], 0.95)
    assert interval.estimate == math.inf


@pytest.mark.parametrize(
    "lost, gained, p",
    [
        # Agresti, Categorical Data Analysis, table 10.1 (86 and 150 discordant): z^2 = 17.36.
        (86, 150, 3.7e-5),
        # statsmodels' documentation of mcnemar, the example of its tests: 121 and 59 discordant.
        (121, 59, 4.4e-6),
        (0, 0, 1.0),
        (5, 0, 0.0625),
        (3, 3, 1.0),
    ],
)
def test_mcnemar(lost, gained, p):
    value = mcnemar(*paired(10, lost, gained, 10))
    assert value == pytest.approx(p, rel=0.05)
    if lost + gained:
        assert value == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-9)


def test_mcnemar_of_many_items():
    assert mcnemar(*paired(0, 3000, 2900, 0)) == pytest.approx(stats.binomtest(3000, 5900).pvalue, rel=1e-9)


@given(st.floats(0.001, 0.5), st.integers(1, 10))
def test_the_looks_share_alpha(alpha, looks):
    shares = split_alpha(alpha, looks)
    assert len(shares) == looks and sum(shares) == pytest.approx(alpha)
    assert all(b == pytest.approx(2 * a) for a, b in zip(shares, shares[1:], strict=False))


def test_three_looks():
    assert split_alpha(0.05, 3) == pytest.approx((0.05 / 7, 0.1 / 7, 0.2 / 7))


@pytest.mark.parametrize("alpha, looks", [(0.0, 3), (1.0, 3), (0.05, 0)])
def test_no_share_of_nothing(alpha, looks):
    with pytest.raises(ValueError, match="looks"):
        split_alpha(alpha, looks)


@pytest.mark.parametrize("successes, n", [(1, 0), (3, 2), (-1, 2)])
def test_no_proportion_of_nothing(successes, n):
    with pytest.raises(ValueError, match="proportion"):
        wilson(successes, n, 0.95)


def test_importing_needs_no_scipy():
    code = "import sys, trimtab.judge.statistics, trimtab.judge; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
