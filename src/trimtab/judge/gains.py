"""Whether a candidate is any better at its goal: an accurate one that is not is rejected too."""

from __future__ import annotations

from trimtab.base.errors import TrimtabError
from trimtab.catalog.goals import GOALS
from trimtab.judge.record import Beside, Measurements, Verdict
from trimtab.recipe import Acceptance


def gain(goal: str, baseline: Measurements, candidate: Measurements) -> float:
    """Returns the relative improvement at the goal: 0.25 is a quarter better, negative is worse.

    Of the goal's measure (`catalog.goals`). Where more is better: candidate / baseline - 1, each divided by the devices
    that it takes. Where less is: 1 - candidate / baseline, the share that is saved. Of a computed measure, any is a
    gain of 1 where the baseline has room for none.

    Raises:
        TrimtabError: an unknown goal, or one of the two was not measured (a baseline of 0, or bytes of 0).
    """
    if goal not in GOALS:
        raise TrimtabError(f"goal '{goal}' is unknown; valid: {', '.join(GOALS)}")
    measure = GOALS[goal].measure
    before, after = getattr(baseline, measure.name), getattr(candidate, measure.name)
    if measure.per_device:
        before, after = before / baseline.devices, after / candidate.devices
    if measure.computed and before <= 0:
        return 1.0 if after > 0 else 0.0
    if before <= 0 or (measure.less_is_better and after <= 0):
        who = "baseline" if before <= 0 else "candidate"
        raise TrimtabError(f"the {who}'s {measure.name} was not measured, so there is no gain for goal '{goal}'")
    return 1 - after / before if measure.less_is_better else after / before - 1


def check_gain(
    verdict: Verdict, goal: str, accept: Acceptance, baseline: Measurements, candidate: Measurements
) -> Verdict:
    """Adds the measurements, the baseline's beside them, and the gain; rejects what is accepted and gains too little.

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
    beside = (verdict.beside or Beside()).model_copy(update={"measurements": baseline})
    update: dict[str, object] = {"gain": value, "measurements": candidate, "beside": beside}
    if verdict.outcome == "accepted" and value < accept.min_gain:
        measure = GOALS[goal].measure
        words = measure.words
        if baseline.devices != candidate.devices and measure.per_device:
            words += f" a device, on {candidate.devices} instead of {baseline.devices}"
        update |= {
            "outcome": "rejected",
            "failure_class": "no_gain",
            "reason": f"accurate but useless for {goal}: {value:+.1%} {words}, less than the "
            f"{accept.min_gain:.1%} asked for",
        }
    return verdict.model_copy(update=update)
