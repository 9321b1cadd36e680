"""What a candidate must be shown to hold: the pooled recovery, that of each critical task, and the perplexity ratio.

Each criterion is an interval beside a limit. It holds where the interval lies wholly on the passing side, it fails
where it lies wholly on the other, and else it is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.judge.record import FailureClass
from trimtab.judge.scores import Scores
from trimtab.judge.statistics import BaselineAtChance, Interval, paired_perplexity_ratio, paired_recovery
from trimtab.recipe import Acceptance
from trimtab.recipe.acceptance import CRITICAL


@dataclass(frozen=True)
class Criterion:
    """One limit, and what was measured of it.

    Attributes:
        kind: the failure class of an attempt that misses it.
        name: "recovery", "recovery of gsm8k", "perplexity ratio".
        limit: what the interval lies beside: recoveries above, the ratio below.
        count: what it was measured on, such as "1800 items".
        interval: None where there is none.
        unknown: why there is none; "" where there is one.
    """

    kind: FailureClass
    name: str
    limit: float
    count: str
    interval: Interval | None
    unknown: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is shown to hold."""
        if self.interval is None:
            return False
        return self.interval.high <= self.limit if self._at_most else self.interval.low >= self.limit

    @property
    def fails(self) -> bool:
        """Whether it is shown not to hold."""
        if self.interval is None:
            return False
        return self.interval.low > self.limit if self._at_most else self.interval.high < self.limit

    @property
    def miss(self) -> float:
        """The share of the limit that the estimate misses it by; negative where it meets it."""
        share = self.interval.estimate / self.limit
        return share - 1 if self._at_most else 1 - share

    @property
    def measured(self) -> str:
        """'recovery 0.981 (0.957 to 1.005)'."""
        found = self.interval
        return f"{self.name} {found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"

    @property
    def bound(self) -> str:
        """'at least 0.95'."""
        return f"at {'most' if self._at_most else 'least'} {self.limit:g}"

    @property
    def told(self) -> str:
        """How it stands, where it does not hold."""
        if self.unknown:
            return self.unknown
        if self.fails:
            return f"{self.measured} is {'above' if self._at_most else 'below'} the limit {self.limit:g}"
        return f"{self.measured} is not shown to be {self.bound}"

    @property
    def _at_most(self) -> bool:
        return self.kind == "perplexity"


def pooled(scores: Scores, accept: Acceptance) -> np.ndarray:
    """Returns which items the pooled recovery is of, bool [n]."""
    return np.isin(scores.tasks, sorted(accept.pooled(np.unique(scores.tasks).tolist())))


def recovery(baseline: Scores, candidate: Scores, of: np.ndarray, confidence: float) -> Interval:
    """Returns the recovery on some of the items, bool [n].

    Raises:
        BaselineAtChance: as `statistics.paired_recovery`.
    """
    return paired_recovery(baseline.items[of], candidate.items[of], candidate.chance[of], confidence)


def criteria(baseline: Scores, candidate: Scores, accept: Acceptance, confidence: float) -> list[Criterion]:
    """Returns what a candidate must hold: recovery first, then the critical tasks, then the perplexity ratio.

    Intervals have the two-sided `confidence`. A required task without items is a criterion that is unknown, and so is
    a critical one, or the pool, on which the baseline is not above chance.
    """
    of = pooled(baseline, accept)
    found = [_recovery("recovery", f"{int(of.sum())} items", accept.min_recovery, baseline, candidate, of, confidence)]
    tasks = sorted(set(baseline.tasks.tolist()))
    for task in (task for task in tasks if accept.tier(task) == CRITICAL):
        of = baseline.tasks == task
        count, limit = f"{int(of.sum())} items of {task}", accept.limit(task)
        found.append(_recovery(f"recovery of {task}", count, limit, baseline, candidate, of, confidence))
    for name in accept.missing(tasks):
        unknown = f"'{name}' is required and was not measured"
        limit = accept.critical.get(name, accept.min_recovery)
        found.append(Criterion("accuracy", f"recovery of {name}", limit, f"0 items of {name}", None, unknown))
    ratio = paired_perplexity_ratio(baseline.nll, candidate.nll, candidate.tokens, confidence)
    count, limit = f"{len(candidate.nll)} windows", accept.max_perplexity_ratio
    return [*found, Criterion("perplexity", "perplexity ratio", limit, count, ratio)]


def _recovery(
    name: str, count: str, limit: float, baseline: Scores, candidate: Scores, of: np.ndarray, confidence: float
) -> Criterion:
    try:
        return Criterion("accuracy", name, limit, count, recovery(baseline, candidate, of, confidence))
    except BaselineAtChance as error:
        whose = name.partition(" of ")[2]
        unknown = f"{whose}: {error}" if whose else str(error)
        return Criterion("accuracy", name, limit, count, None, unknown)


def worst(some: Sequence[Criterion]) -> Criterion:
    """Returns the criterion that is missed by the largest share of its limit, the first of equals."""
    return max(some, key=lambda criterion: criterion.miss)
