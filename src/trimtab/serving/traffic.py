"""The shape of recorded traffic: how long requests are, how many there are at a time, and how far that has moved."""

from __future__ import annotations

import math

import numpy as np

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.recipe.workload import Lengths, Recorded, Workload
from trimtab.serving.request_log import Requests, read

#: Fewer requests say too little of their longest: with log-normal lengths of usual spread (0.8), the 95th percentile
#: of 1,000 is known to 5 %, that of 100 to 17 %.
LEAST = 1000
#: Seconds over which arrivals are counted.
MINUTE = 60.0


class Quantiles(Document):
    """A distribution of lengths in tokens: its mean, and the length that so many of 100 stay within."""

    mean: float
    p10: int
    p25: int
    p50: int
    p75: int
    p90: int
    p95: int
    p99: int
    max: int


class Traffic(Document):
    """The shape of some requests.

    `total` are the tokens of the longest one with its answer. `concurrency` and `rate` are what 95 of 100 requests stay
    within: how many were at work when they came, themselves included, and how many came a second in the minute before.
    They are taken as requests meet them, so that idle nights do not count. `concurrency` is None where it was neither
    recorded nor given.
    """

    requests: int
    days: float
    input: Quantiles
    output: Quantiles
    total: int
    concurrency: int | None
    rate: float

    @property
    def sentence(self) -> str:
        """The shape for people."""
        many = f"{self.concurrency:,} at a time" if self.concurrency else "an unknown number at a time"
        lengths = (
            f"{what} of {some.p50:,} tokens (95 %: {some.p95:,})"
            for what, some in (("prompts", self.input), ("answers", self.output))
        )
        span = f"{self.requests:,} requests in {_duration(self.days)}"
        return f"{span}, {', '.join(lengths)}, {many}, {self.rate:.3g} a second"

    @property
    def workload(self) -> Workload:
        """What an engine for this traffic is sized for.

        Raises:
            InputError: it is not known how many requests there are at a time.
        """
        if self.concurrency is None:
            raise InputError("workload: the log does not say how long requests took; add concurrency: 32, or so")
        lengths = {
            name: Lengths(mean=max(q.mean, 1), p95=max(q.p95, 1), max=max(q.max, 1))
            for name, q in (("input", self.input), ("output", self.output))
        }
        return Workload(**lengths, concurrency=self.concurrency, total=max(self.total, 1))


def of(workload: Workload | Recorded | None) -> Traffic | None:
    """Reads the log that a workload names; None where it names none.

    Raises:
        InputError: not a log, fewer than `LEAST` requests, or it is not known how many there are at a time.
        StoreError: S3 could not be read.
    """
    if not isinstance(workload, Recorded):
        return None
    requests = read(workload.recorded)
    found = shape(requests.newest(workload.days) if workload.days else requests, workload.concurrency)
    if found.requests < LEAST:
        within = f" in its last {workload.days:g} days" if workload.days else ""
        remedy = "write more days" if len(requests) >= LEAST else "record for longer, or state the workload"
        few = f"holds {found.requests:,} requests{within}, which are too few to go by: {LEAST:,} are needed"
        raise InputError(f"workload.recorded: '{workload.recorded}' {few}; {remedy}")
    _ = found.workload  # says what it lacks
    return found


def shape(requests: Requests, concurrency: int | None = None) -> Traffic:
    """Reduces requests to their shape.

    Args:
        requests: at least one.
        concurrency: how many there are at a time, for requests whose seconds are not known.
    """
    span = float(requests.time[-1] - requests.time[0])
    if concurrency is None and not np.isnan(requests.seconds).any():
        concurrency = _p95(_at_work(requests))
    window = min(MINUTE, max(span, 1.0))
    before = np.searchsorted(requests.time, requests.time - window, side="right")
    came = np.searchsorted(requests.time, requests.time, side="right") - before
    return Traffic(
        requests=len(requests),
        days=_brief(span / 86400),
        input=_quantiles(requests.input),
        output=_quantiles(requests.output),
        total=int((requests.input + requests.output).max()),
        concurrency=concurrency,
        rate=_brief(_p95(came) / window),
    )


def drift(before: Traffic, now: Traffic) -> dict[str, tuple[float, str]]:
    """Returns how far traffic has moved, {measure: (times, the sentence)}; 1 is not at all, 2 is double or half.

    The measures are the 50th and 95th percentile of inputs and outputs, each the larger over the smaller, and the load:
    the smaller change of concurrency and rate, 1 where one rises and the other falls. An engine that is merely faster
    finishes earlier what arrives as before, or is asked more by as many clients as before, and changes one of the two.
    """
    found = {}
    for name in ("input", "output"):
        for quantile in ("p50", "p95"):
            old, new = (getattr(getattr(shape, name), quantile) for shape in (before, now))
            found[f"{name} {quantile}"] = abs(_log_ratio(max(old, 1), max(new, 1))), f"{old:,} → {new:,} tokens"
    rates = _log_ratio(before.rate, now.rate)
    load, told = abs(rates), f"{before.rate:.3g} → {now.rate:.3g} requests a second"
    if before.concurrency and now.concurrency:
        many = _log_ratio(before.concurrency, now.concurrency)
        load = min(abs(many), abs(rates)) if many * rates > 0 else 0.0
        told = f"{before.concurrency:,} → {now.concurrency:,} requests at a time, {told}"
    found["load"] = load, told
    times = {name: math.exp(logarithm) for name, (logarithm, _) in found.items()}
    return {name: (times[name], f"{name}: {text}, {times[name]:.2f} times") for name, (_, text) in found.items()}


def _duration(days: float) -> str:
    for unit, each in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * each >= 1:
            return f"{days * each:.3g} {unit}"
    return f"{days * 86400:.3g} seconds"


def _log_ratio(old: float, new: float) -> float:
    return math.log(new / old)


def _at_work(requests: Requests) -> np.ndarray:
    """Returns how many requests were at work when each came, itself included; shape (requests,)."""
    came = np.searchsorted(requests.time, requests.time, side="right")
    ended = np.searchsorted(np.sort(requests.time + requests.seconds), requests.time, side="right")
    return np.maximum(came - ended, 1)


def _quantiles(lengths: np.ndarray) -> Quantiles:
    points = {name: int(name[1:]) for name in Quantiles.model_fields if name[0] == "p"}
    cut = np.percentile(lengths, list(points.values()), method="inverted_cdf")
    mean = _brief(float(lengths.mean()))
    return Quantiles(mean=mean, max=int(lengths.max()), **{n: int(c) for n, c in zip(points, cut, strict=True)})


def _p95(values: np.ndarray) -> int:
    return int(np.percentile(values, 95, method="inverted_cdf"))


def _brief(value: float) -> float:
    """Rounds to five digits: the shape is a part of a release."""
    return float(f"{value:.5g}")
