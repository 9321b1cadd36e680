"""Whether a candidate is any better at its goal: an accurate one that is not is rejected too."""

from __future__ import annotations

from trimtab.errors import TrimtabError
from trimtab.recipe import Acceptance
from trimtab.verdict.record import Measurements, Verdict

#: For each goal: what is measured, its name in a sentence, and whether less of it is better. Of what is better the more
#: there is, it is the share of one device that counts: devices that are saved serve something else.
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
    throughput_tokens_per_second (higher_throughput, lower_cost) or max_context_tokens (long_context), each divided by
    the devices that it takes. Less is better: 1 - candidate / baseline, of bytes (fit_larger_model), the share that is
    saved. A context where the baseline has no room for any is a gain of 1.

    Raises:
        TrimtabError: an unknown goal, or one of the two was not measured (a baseline of 0, or bytes of 0).
    """
    if goal not in _MEASURED:
        raise TrimtabError(f"goal '{goal}' is unknown; valid: {', '.join(_MEASURED)}")
    field, _, less = _MEASURED[goal]
    before, after = getattr(baseline, field), getattr(candidate, field)
    if not less:
        before, after = before / baseline.devices, after / candidate.devices
    if goal == "long_context" and before <= 0:  # computed, so 0 says that there is no room
        return 1.0 if after > 0 else 0.0
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
        if baseline.devices != candidate.devices and not _MEASURED[goal][2]:
            words += f" a device, on {candidate.devices} instead of {baseline.devices}"
        update |= {
            "outcome": "rejected",
            "failure_class": "no_gain",
            "reason": f"accurate but useless for {goal}: {value:+.1%} {words}, less than the "
            f"{accept.min_gain:.1%} asked for",
        }
    return verdict.model_copy(update=update)
