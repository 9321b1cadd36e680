"""Judges a candidate against the baseline, by error rates that are stated here.

The error rates, where items and windows are independent draws (simulated in tests/unit/judge/test_verdict.py: a
candidate exactly at a limit is accepted in 3 to 4 % of runs at confidence 0.95; in up to 6 % where the
differences of 16 to 48 windows are strongly skewed, which Student's t does not allow for):

- `judge`: a candidate that truly misses a limit is accepted with probability at most 1 - confidence, over all
  looks together. Each look spends its share (`trimtab.judge.statistics.split_alpha`) on each criterion in full: a
  candidate is accepted only if it passes all of them, the limit of each critical task among them, so a candidate that
  misses one must be wrongly passed by that one (intersection-union test, Berger 1982, Technometrics 24:295).
- An interval shown at a look has both its ends at that look's one-sided error: with confidence 0.95 and three
  looks, one-sided 0.0071, 0.0143 and 0.0286, hence two-sided 98.6 %, 97.1 % and 94.3 %. A limit inside the
  interval is exactly a criterion that is undecided.
- A candidate that truly meets all limits is rejected by `judge` with probability at most 1 - confidence times the
  number of criteria: two, and one more for each critical task (each may err).
- `confirm`: several attempts are several chances of a false acceptance. It asks fresh items at one-sided
  error 1 / attempts, so a run releases a model that truly misses a limit with probability at most
  attempts x (1 - confidence) x (1 / attempts) = 1 - confidence.
"""

from __future__ import annotations

from trimtab.base.errors import TrimtabError
from trimtab.judge.criteria import Criterion, criteria, pooled, worst
from trimtab.judge.damage import Text, damage
from trimtab.judge.record import KV_CACHE_SUSPECT, Beside, Confirmation, Verdict
from trimtab.judge.scores import Scores, check_pair
from trimtab.judge.statistics import Interval, mcnemar, split_alpha, wilson
from trimtab.recipe import Acceptance

_MORE = "; more are needed"


def judge(
    *,
    baseline: Scores,
    candidate: Scores,
    accept: Acceptance,
    look: int,
    looks: int = 3,
    text: tuple[Text, Text] | None = None,
) -> Verdict:
    """Judges a candidate on all items and windows drawn so far.

    Accepted if the recovery interval lies wholly at or above `min_recovery`, that of each critical task at or above the
    task's own limit, and the ratio interval wholly at or below `max_perplexity_ratio`. Rejected if one lies wholly on
    the failing side; if several do, for that missed by the largest share, estimate against limit. Otherwise
    indeterminate; before the last look that asks for more items and has no failure class, at the last it has the class
    of the first criterion that was not shown (accuracy if neither was). A baseline that is not above chance on what is
    pooled is indeterminate whatever the rest says: recovery has no meaning on such tasks. A required task without items
    leaves the verdict open. A likelihood that is not finite is rejected as degenerate_output.

    Args:
        baseline: scores of the unchanged model, cumulative over the looks.
        candidate: scores on the same items and windows in the same order.
        accept: the limits and the confidence.
        look: 1 for the first.
        looks: how many there are at most; fixed before the first.
        text: what baseline and candidate predicted token by token, for the card alone.

    Raises:
        NotPaired: the two did not answer the same items.
        TrimtabError: `look` is not in 1..looks, or the baseline's likelihood is not finite.
    """
    if not 1 <= look <= looks:
        raise TrimtabError(f"look {look} is not one of 1 to {looks}")
    confidence = 1 - 2 * split_alpha(1 - accept.confidence, looks)[look - 1]
    broken = check_pair(baseline, candidate)
    of, m = pooled(candidate, accept), len(candidate.nll)
    n = int(of.sum())
    numbers = {
        "looks": look,
        "items": n,
        "windows": m,
        "perplexity": candidate.perplexity,
        "accuracy": wilson(float(candidate.items[of].sum()), n, confidence) if n else None,
        "mcnemar_p": mcnemar(baseline.items[of], candidate.items[of]) if n else None,
        "beside": Beside(
            accuracy=wilson(float(baseline.items[of].sum()), n, confidence) if n else None,
            perplexity=baseline.perplexity,
        ),
    }
    if broken:
        return Verdict(outcome="rejected", failure_class="degenerate_output", reason=broken, **numbers)
    found = criteria(baseline, candidate, accept, confidence)
    numbers |= {"recovery": found[0].interval, "perplexity_ratio": found[-1].interval}
    numbers["damage"] = damage(baseline, candidate, accept, confidence, text)
    last = look == looks
    if found[0].unknown:
        return Verdict(
            outcome="indeterminate",
            failure_class="accuracy" if last else None,
            reason=f"{found[0].unknown}: choose tasks that the model can do",
            **numbers,
        )
    if all(each.holds for each in found):
        return Verdict(outcome="accepted", reason=_all_hold(found), **numbers)
    if failing := [each for each in found if each.fails]:
        kind = worst(failing)
        return Verdict(outcome="rejected", failure_class=kind.kind, reason=kind.told, **numbers)
    open_ones = [each for each in found if not each.holds]
    return Verdict(
        outcome="indeterminate",
        failure_class=open_ones[0].kind if last else None,
        reason=_open(open_ones) + ("" if last else _MORE),
        **numbers,
    )


def _all_hold(found: list[Criterion]) -> str:
    recovery, *critical, ratio = found
    told = [f"{recovery.measured} is {recovery.bound}", *(f"{each.measured} {each.bound}" for each in critical)]
    return f"{', '.join(told)} and {ratio.measured} {ratio.bound}"


def _open(open_ones: list[Criterion]) -> str:
    told = " and ".join(each.told for each in open_ones)
    counted = [each.count for each in open_ones if not each.unknown]
    return f"{' and '.join(counted)} are too few to tell: {told}" if counted else told


def confirm(
    verdict: Verdict, baseline: Scores, candidate: Scores, accept: Acceptance, *, attempts: int = 5
) -> Verdict:
    """Confirms an accepted verdict on fresh items, or rejects it.

    Among several attempts one may pass by luck, and its luck does not repeat on fresh items. The attempt is
    confirmed if all limits hold there at one-sided error 1 / attempts, which keeps the probability that a
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
    record = {"items": int(pooled(candidate, accept).sum()), "windows": len(candidate.nll), "level": 1 - alpha}

    def rejected(kind: str, why: str, **intervals: Interval | None) -> Verdict:
        return verdict.model_copy(
            update={
                "outcome": "rejected",
                "failure_class": kind,
                "reason": f"not confirmed on fresh items: {why}",
                "confirmed": False,
                "confirmation": Confirmation(**record, **intervals),
            }
        )

    if broken := check_pair(baseline, candidate):
        return rejected("degenerate_output", broken)
    found = criteria(baseline, candidate, accept, 1 - 2 * alpha)
    intervals = {"recovery": found[0].interval, "perplexity_ratio": found[-1].interval}
    if all(each.holds for each in found):
        return verdict.model_copy(update={"confirmed": True, "confirmation": Confirmation(**record, **intervals)})
    if unknown := [each for each in found if each.unknown]:
        return rejected(unknown[0].kind, unknown[0].told, **intervals)
    kind = worst([each for each in found if each.fails] or [each for each in found if not each.holds])
    return rejected(kind.kind, kind.told, **intervals)


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


def _ratio_text(ratio: Interval) -> str:
    return f"perplexity ratio {ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
