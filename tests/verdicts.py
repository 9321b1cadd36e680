"""Scores of a baseline and a candidate by counts, and what is judged of them by the default limits."""

import math

import numpy as np

from trimtab.judge import Scores, Verdict, judge
from trimtab.judge.statistics import Interval
from trimtab.recipe import Acceptance

ACCEPT = Acceptance()
CHANCE = 0.35
ACCEPTED = Verdict(outcome="accepted", reason="good", recovery=Interval(estimate=1, low=0.96, high=1.04))


def scores(right, nll, tokens=256, chance=CHANCE):
    right, nll = np.asarray(right, dtype=float), np.asarray(nll, dtype=float)
    n, m = len(right), len(nll)
    return Scores(right, np.full(n, chance), nll, np.full(m, tokens), np.arange(n), np.arange(m))


def pair(n=1800, lost=20, gained=20, accuracy=0.8, ratio=1.03, noise=0.02, windows=48):
    """Returns baseline and candidate: exact counts of lost and gained items, log ratios about one value."""
    right = round(n * accuracy)
    counts = [right - lost, lost, gained, n - right - gained]
    nll = np.linspace(500, 700, windows)
    wiggle = noise * np.sin(np.arange(windows) * math.pi / 2) * 256
    return (
        scores(np.repeat([1, 1, 0, 0], counts), nll),
        scores(np.repeat([1, 0, 1, 0], counts), nll + math.log(ratio) * 256 + wiggle),
    )


def decide(look=3, **kwargs):
    baseline, candidate = pair(**kwargs)
    return judge(baseline=baseline, candidate=candidate, accept=ACCEPT, look=look)
