"""The damage card: what was lost by task, by place in the text, and in what the model would have said next.

It explains a verdict and decides nothing but what critical tasks decide: `judge.verdict` does that. KL divergence and
agreement of the likeliest tokens move far less by chance than answers to items do, so they can rank what is tried next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.base.schema import Document
from trimtab.judge.scores import Scores
from trimtab.judge.statistics import (
    BaselineAtChance,
    Interval,
    paired_perplexity_ratio,
    paired_recovery,
    t_quantile,
)
from trimtab.recipe import Acceptance
from trimtab.recipe.acceptance import ADVISORY

#: Tokens before which the first places of the text end; each further span is as many times as long as what lies before.
SHORT, TIMES = 64, 4


class TaskDamage(Document):
    """One task. `baseline` and `candidate` are shares of right answers to the same items; `lost` items the baseline
    alone has right, or more of, `gained` ones the candidate. `recovery` is None where the baseline is not above chance
    on so few. `limit` is what a critical task must keep, None for others.
    """

    task: str
    tier: Literal["critical", "supporting", "advisory"] = "supporting"
    limit: float | None = None
    items: int
    baseline: float
    candidate: float
    lost: int
    gained: int
    recovery: Interval | None = None

    @property
    def holds(self) -> bool | None:
        """Whether a critical task is shown to keep its share, or not to; None while it is open, and for others."""
        if self.limit is None or self.recovery is None:
            return None
        return True if self.recovery.low >= self.limit else False if self.recovery.high < self.limit else None


class PlaceDamage(Document):
    """The perplexity ratio of the tokens `first` to `last` of all windows; the first token that is predicted is 1."""

    first: int
    last: int
    perplexity_ratio: Interval


class Damage(Document):
    """What an attempt lost, beside the baseline, on what both were asked at the looks.

    Intervals have two-sided `confidence`, each by itself. `worst` is the task that keeps least, of those that are not
    advisory and have a recovery; "" for none. `kl` is the mean KL divergence of the next token in nats, of the
    baseline's distribution from the candidate's, with all tokens that are not among the likeliest of both taken as one:
    never more than the whole divergence. `agreement` is the share of places where both find the same token likeliest.
    Both are None where the engine does not tell, as `places` are then.
    """

    confidence: float
    tasks: tuple[TaskDamage, ...] = ()
    worst: str = ""
    places: tuple[PlaceDamage, ...] = ()
    kl: Interval | None = None
    agreement: Interval | None = None


@dataclass(frozen=True, eq=False)
class Text:
    """What one model predicts at each place of m windows of the text, L places each.

    Args:
        nll: the nats of each token, [m, L].
        tokens: the likeliest tokens of each place, the likeliest first, int [m, L, K]; K is 0 where nobody told.
        log_probs: theirs, in nats, [m, L, K].
    """

    nll: np.ndarray
    tokens: np.ndarray
    log_probs: np.ndarray


def damage(
    baseline: Scores,
    candidate: Scores,
    accept: Acceptance,
    confidence: float,
    text: tuple[Text, Text] | None = None,
) -> Damage:
    """Returns the card of a candidate.

    Args:
        accept: the tiers of the tasks.
        confidence: of each interval, two-sided.
        text: what both predict token by token, the baseline first.
    """
    names = sorted(set(baseline.tasks.tolist()) - {""})
    tasks = tuple(_task(name, baseline, candidate, accept, confidence) for name in names)
    known = [task for task in tasks if task.recovery and task.tier != ADVISORY]
    worst = min(known, key=lambda task: task.recovery.estimate).task if known else ""
    told = _text(*text, confidence) if text and text[0].nll.shape == text[1].nll.shape and text[0].nll.size else {}
    return Damage(confidence=confidence, tasks=tasks, worst=worst, **told)


def _task(name: str, baseline: Scores, candidate: Scores, accept: Acceptance, confidence: float) -> TaskDamage:
    of = baseline.tasks == name
    before, after = baseline.items[of], candidate.items[of]
    try:
        recovery = paired_recovery(before, after, candidate.chance[of], confidence)
    except BaselineAtChance:
        recovery = None
    return TaskDamage(
        task=name,
        tier=accept.tier(name),
        limit=accept.limit(name),
        items=len(before),
        baseline=float(before.mean()),
        candidate=float(after.mean()),
        lost=int((before > after).sum()),
        gained=int((after > before).sum()),
        recovery=recovery,
    )


def _text(baseline: Text, candidate: Text, confidence: float) -> dict[str, object]:
    windows, length = baseline.nll.shape
    places, first = [], 0
    while first < length:
        last = min(length, max(SHORT - 1, TIMES * (first + 1) - 1))
        nats = (text.nll[:, first:last].sum(1) for text in (baseline, candidate))
        tokens = np.full(windows, last - first)
        ratio = paired_perplexity_ratio(*nats, tokens, confidence)
        places.append(PlaceDamage(first=first + 1, last=last, perplexity_ratio=ratio))
        first = last
    told: dict[str, object] = {"places": tuple(places)}
    if min(baseline.tokens.shape[-1], candidate.tokens.shape[-1]):
        pairs = [(_of(baseline, window), _of(candidate, window)) for window in range(windows)]
        for name, measure in (("kl", _divergence), ("agreement", _agreement)):
            told[name] = _mean([measure(*pair) for pair in pairs], confidence)
    return told


def _of(text: Text, window: int) -> tuple[np.ndarray, np.ndarray]:
    return text.tokens[window], text.log_probs[window].astype(float)


_Told = tuple[np.ndarray, np.ndarray]


def _divergence(baseline: _Told, candidate: _Told) -> float:
    """Returns the mean KL divergence over the places of a window, in nats.

    Tokens that both name are compared one by one and all others as one event: joining events never adds to a divergence
    (the data processing inequality; Cover and Thomas 2006, Elements of Information Theory, section 2.8).
    """
    same = baseline[0][:, :, None] == candidate[0][:, None, :]  # [L, K, K]
    shared, place = same.any(-1), same.argmax(-1)
    log_p = baseline[1]
    log_q = np.take_along_axis(candidate[1], place, axis=1)
    p = np.where(shared, np.exp(log_p), 0.0)
    q = np.where(shared, np.exp(log_q), 0.0)
    named = (p * np.where(shared, log_p - log_q, 0.0)).sum(-1)
    rest = np.clip(np.stack([1 - p.sum(-1), 1 - q.sum(-1)]), 1e-6, 1.0)  # a sum of 20 rounded shares errs by as much
    return float((named + rest[0] * np.log(rest[0] / rest[1])).mean())


def _agreement(baseline: _Told, candidate: _Told) -> float:
    return float((baseline[0][:, 0] == candidate[0][:, 0]).mean())


def _mean(values: list[float], confidence: float) -> Interval:
    """Returns the mean over windows with Student's interval: places within a window depend on one another."""
    found = np.asarray(values)
    estimate, n = float(found.mean()), len(found)
    if n < 2:
        return Interval(estimate=estimate, low=-np.inf, high=np.inf)
    half = t_quantile((1 + confidence) / 2, n - 1) * float(found.std(ddof=1)) / n**0.5
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)
