"""What a model scored, and whether two models answered the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.base.errors import TrimtabError


class NotPaired(TrimtabError):
    """Baseline and candidate did not answer the same items in the same order."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model scored: n items and m windows, in an order that baseline and candidate share.

    Args:
        items: scores in [0, 1], shape (n,), n >= 1.
        chance: the score that guessing is expected to have on each item, in [0, 1), shape (n,).
        nll: total negative log-likelihood of each window in nats, shape (m,), m >= 1.
        tokens: tokens predicted in each window, positive, shape (m,).
        item_ids: what identifies each item (a digest or a name), shape (n,).
        window_ids: what identifies each window, shape (m,).
        tasks: the task that each item is of, shape (n,); all are of one without a name where it is absent.

    Raises:
        TrimtabError: a wrong shape or range. A likelihood that is not finite is allowed: `judge` reports it.
    """

    items: np.ndarray
    chance: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    item_ids: np.ndarray | Sequence[str]
    window_ids: np.ndarray | Sequence[str]
    tasks: np.ndarray | Sequence[str] = ()

    def __post_init__(self):
        for name in ("items", "chance", "nll", "tokens"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        if not len(self.tasks):
            object.__setattr__(self, "tasks", np.full(len(self.items), ""))
        for name in ("item_ids", "window_ids", "tasks"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        shapes = [getattr(self, name).shape for name in ("items", "chance", "item_ids", "tasks")]
        self._require(
            len(set(shapes)) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 0, f"items have {shapes}"
        )
        shapes = [getattr(self, name).shape for name in ("nll", "tokens", "window_ids")]
        self._require(
            len(set(shapes)) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 0, f"windows have {shapes}"
        )
        self._require(bool(((self.items >= 0) & (self.items <= 1)).all()), "an item's score is not in [0, 1]")
        self._require(bool(((self.chance >= 0) & (self.chance < 1)).all()), "a chance is not in [0, 1)")
        self._require(bool((self.tokens > 0).all()), "a window has no tokens")

    @property
    def perplexity(self) -> float | None:
        """exp(nats per token) over all windows; None if not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(np.exp(self.nll.sum() / self.tokens.sum()))
        return value if math.isfinite(value) else None

    @staticmethod
    def _require(condition: bool, what: str) -> None:
        if not condition:
            raise TrimtabError(f"scores cannot be judged: {what}")


def check_pair(baseline: Scores, candidate: Scores) -> str:
    """Returns what is wrong with the candidate's likelihoods, or "" if nothing is."""
    for what in ("item_ids", "chance", "window_ids", "tokens"):
        ours, theirs = getattr(candidate, what), getattr(baseline, what)
        if not np.array_equal(ours, theirs):
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            where = (
                f"lengths {len(theirs)} and {len(ours)}" if place is None else f"first at position {place}"
            )
            raise NotPaired(f"baseline and candidate were not given the same items: {what} differ ({where})")
    if not np.isfinite(baseline.nll).all():
        raise TrimtabError("the baseline's log-likelihood is not finite: the unchanged model does not run")
    broken = int((~np.isfinite(candidate.nll)).sum())
    total = len(candidate.nll)
    return f"the candidate's log-likelihood is not finite in {broken} of {total} windows" if broken else ""
