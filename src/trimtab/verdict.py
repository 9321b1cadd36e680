"""The verdict on one attempt: a statement about the candidate against the baseline, with its certainty.

The error rates, where items and windows are independent draws (simulated in tests/unit/test_verdict.py: a
candidate exactly at a limit is accepted in 3 to 4 % of runs at confidence 0.95; in up to 6 % where the
differences of 16 to 48 windows are strongly skewed, which Student's t does not allow for):

- `judge`: a candidate that truly misses a limit is accepted with probability at most 1 - confidence, over all
  looks together. Each look spends its share (`trimtab.statistics.split_alpha`) on each criterion in full: a
  candidate is accepted only if it passes both, so a candidate that misses one must be wrongly passed by that
  one (intersection-union test, Berger 1982, Technometrics 24:295).
- An interval shown at a look has both its ends at that look's one-sided error: with confidence 0.95 and three
  looks, one-sided 0.0071, 0.0143 and 0.0286, hence two-sided 98.6 %, 97.1 % and 94.3 %. A limit inside the
  interval is exactly a criterion that is undecided.
- A candidate that truly meets both limits is rejected by `judge` with probability at most twice
  1 - confidence (either criterion may err).
- `confirm`: several attempts are several chances of a false acceptance. It asks fresh items at one-sided
  error 1 / attempts, so a run releases a model that truly misses a limit with probability at most
  attempts x (1 - confidence) x (1 / attempts) = 1 - confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.recipe import Acceptance
from trimtab.schema import Document
from trimtab.statistics import (
    BaselineAtChance,
    Interval,
    mcnemar,
    paired_perplexity_ratio,
    paired_recovery,
    split_alpha,
    wilson,
)

__all__ = [
    "FAILURE_CLASSES",
    "Confirmation",
    "FailureClass",
    "Interval",
    "Measurements",
    "NotPaired",
    "Scores",
    "Verdict",
    "blame_kv_cache",
    "check_gain",
    "confirm",
    "gain",
    "judge",
]

FailureClass = Literal[
    "accuracy",
    "kv_cache_accuracy",
    "perplexity",
    "no_gain",
    "export_damaged",
    "degenerate_output",
    "does_not_fit",
    "unsupported",
    "training_diverged",
]
FAILURE_CLASSES: tuple[str, ...] = FailureClass.__args__
#: The classes that a quantized KV cache may be the cause of, and that judging it apart can tell.
KV_CACHE_SUSPECT = ("accuracy", "perplexity")
_MORE = "; more are needed"


class NotPaired(TrimtabError):
    """Baseline and candidate did not answer the same items in the same order."""


class Measurements(Document):
    """What the engine cost; 0 means not measured.

    `bytes` of the artifact's files; `quantized_share` is the bytes of the quantized tensors over their bytes
    in BF16; decode at batch 1 and throughput at batch 8, in tokens a second; the peak memory in bytes; the
    longest context that fits the target, in tokens.
    """

    bytes: int = 0
    quantized_share: float = 1.0
    decode_tokens_per_second: float = 0.0
    throughput_tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    max_context_tokens: int = 0


class Confirmation(Document):
    """What fresh items said of an accepted attempt; interval ends have one-sided confidence `level`."""

    items: int
    windows: int
    level: float
    recovery: Interval | None = None
    perplexity_ratio: Interval | None = None


class Verdict(Document):
    """What is said of one attempt, and the numbers it rests on.

    `looks` says how often items were drawn, `items` and `windows` how many there were in all. `accuracy` and
    `perplexity` are the candidate's; `recovery` and `perplexity_ratio` compare it with the baseline. All
    intervals have the two-sided confidence of their look (see the module). `mcnemar_p`, for the hypothesis
    that nothing changed, is shown and not decided on. `gain` is the relative improvement at the goal.
    """

    outcome: Literal["accepted", "rejected", "indeterminate", "baseline"]
    failure_class: FailureClass | None = None
    reason: str
    looks: int = 0
    items: int = 0
    windows: int = 0
    accuracy: Interval | None = None
    recovery: Interval | None = None
    perplexity: float | None = None
    perplexity_ratio: Interval | None = None
    mcnemar_p: float | None = None
    gain: float | None = None
    confirmed: bool = False
    confirmation: Confirmation | None = None
    measurements: Measurements = Measurements()


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

    Raises:
        TrimtabError: a wrong shape or range. A likelihood that is not finite is allowed: `judge` reports it.
    """

    items: np.ndarray
    chance: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    item_ids: np.ndarray | Sequence[str]
    window_ids: np.ndarray | Sequence[str]

    def __post_init__(self):
        for name in ("items", "chance", "nll", "tokens"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        for name in ("item_ids", "window_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        shapes = [getattr(self, name).shape for name in ("items", "chance", "item_ids")]
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


def judge(*, baseline: Scores, candidate: Scores, accept: Acceptance, look: int, looks: int = 3) -> Verdict:
    """Judges a candidate on all items and windows drawn so far.

    Accepted if the recovery interval lies wholly at or above `min_recovery` and the ratio interval wholly at
    or below `max_perplexity_ratio`. Rejected if either lies wholly on the failing side; if both do, the
    failure class is that of the limit missed by the larger share: 1 - recovery / min_recovery against
    ratio / max_perplexity_ratio - 1, both estimates. Otherwise indeterminate; before the last look
    that asks for more items and has no failure class, at the last it has the class of the criterion that was
    not shown (accuracy if neither was). A baseline that is not above chance is indeterminate whatever the
    perplexity says: recovery has no meaning on such tasks. A likelihood that is not finite is rejected as
    degenerate_output.

    Args:
        baseline: scores of the unchanged model, cumulative over the looks.
        candidate: scores on the same items and windows in the same order.
        accept: the limits and the confidence.
        look: 1 for the first.
        looks: how many there are at most; fixed before the first.

    Raises:
        NotPaired: the two did not answer the same items.
        TrimtabError: `look` is not in 1..looks, or the baseline's likelihood is not finite.
    """
    if not 1 <= look <= looks:
        raise TrimtabError(f"look {look} is not one of 1 to {looks}")
    confidence = 1 - 2 * split_alpha(1 - accept.confidence, looks)[look - 1]
    damage = _check_pair(baseline, candidate)
    n, m = len(candidate.items), len(candidate.nll)
    numbers = {
        "looks": look,
        "items": n,
        "windows": m,
        "accuracy": wilson(float(candidate.items.sum()), n, confidence),
        "perplexity": candidate.perplexity,
        "mcnemar_p": mcnemar(baseline.items, candidate.items),
    }
    if damage:
        return Verdict(outcome="rejected", failure_class="degenerate_output", reason=damage, **numbers)
    ratio = paired_perplexity_ratio(baseline.nll, candidate.nll, candidate.tokens, confidence)
    numbers["perplexity_ratio"] = ratio
    last = look == looks
    try:
        recovery = paired_recovery(baseline.items, candidate.items, candidate.chance, confidence)
    except BaselineAtChance as error:
        return Verdict(
            outcome="indeterminate",
            failure_class="accuracy" if last else None,
            reason=f"{error}: choose tasks that the model can do",
            **numbers,
        )
    numbers["recovery"] = recovery
    passes, fails = _compare(recovery, ratio, accept)
    if all(passes.values()):
        return Verdict(
            outcome="accepted",
            reason=f"{_recovery_text(recovery)} is at least {accept.min_recovery:g} and "
            f"{_ratio_text(ratio)} at most {accept.max_perplexity_ratio:g}",
            **numbers,
        )
    if any(fails.values()):
        kind = _worse(recovery, ratio, accept) if all(fails.values()) else next(k for k in fails if fails[k])
        return Verdict(
            outcome="rejected", failure_class=kind, reason=_failed(kind, recovery, ratio, accept), **numbers
        )
    open_kinds = [kind for kind in passes if not passes[kind]]
    undecided = " and ".join(_undecided(kind, recovery, ratio, accept) for kind in open_kinds)
    count = " and ".join(
        {"accuracy": f"{n} items", "perplexity": f"{m} windows"}[kind] for kind in open_kinds
    )
    return Verdict(
        outcome="indeterminate",
        failure_class=open_kinds[0] if last else None,
        reason=f"{count} are too few to tell: {undecided}" + ("" if last else _MORE),
        **numbers,
    )


def confirm(
    verdict: Verdict, baseline: Scores, candidate: Scores, accept: Acceptance, *, attempts: int = 5
) -> Verdict:
    """Confirms an accepted verdict on fresh items, or rejects it.

    Among several attempts one may pass by luck, and its luck does not repeat on fresh items. The attempt is
    confirmed if both limits hold there at one-sided error 1 / attempts, which keeps the probability that a
    run releases a model that truly misses a limit within 1 - confidence, over all attempts: each is accepted
    wrongly with 1 - confidence, then confirmed wrongly with 1 / attempts. For two attempts, or one, that asks
    the estimates to meet the limits; for five, that they do so by 0.84 standard errors. Asking the estimates
    alone would let five attempts err with up to 0.12 at confidence 0.95. Keep these items out of the looks,
    and draw others for a second confirmation in the same run: otherwise a failed one steers the loop.

    The intervals of the looks stay in the verdict; those of the fresh items go into `confirmation`, with both
    ends at one-sided error 1 / attempts (0.5 gives the estimate itself). A rejection says whether the fresh
    items contradict (an interval wholly on the failing side) or merely do not confirm.

    Args:
        verdict: an accepted one.
        baseline: scores on items that no look has used.
        candidate: scores on the same items.
        accept: the limits that `verdict` was judged by.
        attempts: how many attempts the run may make, not how many it made.

    Raises:
        NotPaired: the two did not answer the same items.
        TrimtabError: the verdict is not accepted, or `attempts` < 1.
    """
    if verdict.outcome != "accepted":
        raise TrimtabError(f"only an accepted verdict can be confirmed, this one is {verdict.outcome}")
    if attempts < 1:
        raise TrimtabError(f"attempts is {attempts}; a run makes at least 1")
    alpha = min(0.5, 1 / attempts)
    record = {"items": len(candidate.items), "windows": len(candidate.nll), "level": 1 - alpha}

    def rejected(kind: str, why: str, **intervals: Interval) -> Verdict:
        return verdict.model_copy(
            update={
                "outcome": "rejected",
                "failure_class": kind,
                "reason": f"not confirmed on fresh items: {why}",
                "confirmed": False,
                "confirmation": Confirmation(**record, **intervals),
            }
        )

    damage = _check_pair(baseline, candidate)
    if damage:
        return rejected("degenerate_output", damage)
    ratio = paired_perplexity_ratio(baseline.nll, candidate.nll, candidate.tokens, 1 - 2 * alpha)
    try:
        recovery = paired_recovery(baseline.items, candidate.items, candidate.chance, 1 - 2 * alpha)
    except BaselineAtChance as error:
        return rejected("accuracy", str(error), perplexity_ratio=ratio)
    passes, fails = _compare(recovery, ratio, accept)
    if all(passes.values()):
        confirmation = Confirmation(**record, recovery=recovery, perplexity_ratio=ratio)
        return verdict.model_copy(update={"confirmed": True, "confirmation": confirmation})
    kinds = [kind for kind in passes if fails[kind]] or [kind for kind in passes if not passes[kind]]
    kind = _worse(recovery, ratio, accept) if len(kinds) > 1 else kinds[0]
    why = (_failed if fails[kind] else _undecided)(kind, recovery, ratio, accept)
    return rejected(kind, why, recovery=recovery, perplexity_ratio=ratio)


def blame_kv_cache(verdict: Verdict, kv_cache: str, apart: Verdict) -> Verdict:
    """Says whether the KV cache is why an attempt was not accepted.

    It is if the same export is accepted with its KV cache in 16 bits: then the attempt is rejected with the
    class kv_cache_accuracy, also when it was merely undecided, because dropping the KV cache alone is known to
    help. Otherwise outcome and class stay, and the reason says what was found.

    Args:
        verdict: what was judged with the KV cache that the recipe asks for, of class accuracy or perplexity.
        kv_cache: the format of that KV cache.
        apart: what was judged in the same way with 16 bits.

    Raises:
        TrimtabError: the verdict is accepted, or of another class.
    """
    if verdict.outcome == "accepted" or verdict.failure_class not in KV_CACHE_SUSPECT:
        raise TrimtabError(f"a KV cache is not to blame for {verdict.outcome}, {verdict.failure_class}")
    if apart.outcome == "accepted":
        update = {
            "outcome": "rejected",
            "failure_class": "kv_cache_accuracy",
            "reason": f"the KV cache is to blame: {_ratio_text(verdict.perplexity_ratio)} in {kv_cache}, "
            f"{_ratio_text(apart.perplexity_ratio)} in 16 bits, which is accepted; in {kv_cache} {verdict.reason}",
        }
    else:
        blame = "is not" if apart.outcome == "rejected" else "is not shown to be"
        found = apart.reason.removesuffix(_MORE)
        update = {"reason": f"{verdict.reason.removesuffix(_MORE)}; the KV cache {blame} to blame: in 16 bits {found}"}
    return verdict.model_copy(update=update)


#: For each goal: what is measured, its name in a sentence, and whether less of it is better.
_MEASURED = {
    "lower_latency": ("decode_tokens_per_second", "faster decoding", False),
    "higher_throughput": ("throughput_tokens_per_second", "more throughput", False),
    "fit_larger_model": ("bytes", "fewer bytes", True),
    "long_context": ("max_context_tokens", "longer context", False),
    "lower_cost": ("throughput_tokens_per_second", "more throughput", False),
}


def gain(goal: str, baseline: Measurements, candidate: Measurements) -> float:
    """Returns the relative improvement at the goal: 0.25 is a quarter better, negative is worse.

    More is better: candidate / baseline - 1, of decode_tokens_per_second (lower_latency),
    throughput_tokens_per_second (higher_throughput, lower_cost) or max_context_tokens (long_context). Less is
    better: 1 - candidate / baseline, of bytes (fit_larger_model), the share that is saved.

    Raises:
        TrimtabError: an unknown goal, or one of the two was not measured (a baseline of 0, or bytes of 0).
    """
    if goal not in _MEASURED:
        raise TrimtabError(f"goal '{goal}' is unknown; valid: {', '.join(_MEASURED)}")
    field, _, less = _MEASURED[goal]
    before, after = getattr(baseline, field), getattr(candidate, field)
    if before <= 0 or (less and after <= 0):
        who = "baseline" if before <= 0 else "candidate"
        raise TrimtabError(f"the {who}'s {field} was not measured, so there is no gain for goal '{goal}'")
    return 1 - after / before if less else after / before - 1


def check_gain(
    verdict: Verdict, goal: str, accept: Acceptance, baseline: Measurements, candidate: Measurements
) -> Verdict:
    """Adds the measurements and the gain, and rejects an accepted verdict that gains less than `min_gain`.

    Ask before `confirm`: a useless artifact needs no fresh items. A verdict that is not accepted keeps its
    outcome, and may lack the measurements that the gain needs.

    Raises:
        TrimtabError: an accepted verdict whose gain was not measured.
    """
    try:
        value = gain(goal, baseline, candidate)
    except TrimtabError:
        if verdict.outcome == "accepted":
            raise
        return verdict.model_copy(update={"measurements": candidate})
    update: dict[str, object] = {"gain": value, "measurements": candidate}
    if verdict.outcome == "accepted" and value < accept.min_gain:
        words = _MEASURED[goal][1]
        update |= {
            "outcome": "rejected",
            "failure_class": "no_gain",
            "reason": f"accurate but useless for {goal}: {value:+.1%} {words}, less than the "
            f"{accept.min_gain:.1%} asked for",
        }
    return verdict.model_copy(update=update)


def _check_pair(baseline: Scores, candidate: Scores) -> str:
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


def _compare(
    recovery: Interval, ratio: Interval, accept: Acceptance
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Returns for each criterion whether it is shown to hold, and whether it is shown to fail."""
    passes = {
        "accuracy": recovery.low >= accept.min_recovery,
        "perplexity": ratio.high <= accept.max_perplexity_ratio,
    }
    fails = {
        "accuracy": recovery.high < accept.min_recovery,
        "perplexity": ratio.low > accept.max_perplexity_ratio,
    }
    return passes, fails


def _worse(recovery: Interval, ratio: Interval, accept: Acceptance) -> str:
    short = 1 - recovery.estimate / accept.min_recovery
    return "accuracy" if short >= ratio.estimate / accept.max_perplexity_ratio - 1 else "perplexity"


def _failed(kind: str, recovery: Interval, ratio: Interval, accept: Acceptance) -> str:
    if kind == "accuracy":
        return f"{_recovery_text(recovery)} is below the limit {accept.min_recovery:g}"
    return f"{_ratio_text(ratio)} is above the limit {accept.max_perplexity_ratio:g}"


def _undecided(kind: str, recovery: Interval, ratio: Interval, accept: Acceptance) -> str:
    if kind == "accuracy":
        return f"{_recovery_text(recovery)} is not shown to be at least {accept.min_recovery:g}"
    return f"{_ratio_text(ratio)} is not shown to be at most {accept.max_perplexity_ratio:g}"


def _recovery_text(recovery: Interval) -> str:
    return f"recovery {recovery.estimate:.3f} ({recovery.low:.3f} to {recovery.high:.3f})"


def _ratio_text(ratio: Interval) -> str:
    return f"perplexity ratio {ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
