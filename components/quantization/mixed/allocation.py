"""Which layer gets how many bits: a small integer program over measured sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS


@dataclass(frozen=True)
class Group:
    """Layers that must share a format (an engine fuses them), their weights, and the harm of each format.

    `harm` maps a format's name to its measured sensitivity: the expected rise of the loss, summed over the
    calibration windows; only differences inside a run matter.
    """

    layers: tuple[str, ...]
    weights: int
    harm: dict[str, float]


def bits_of(form: str) -> float:
    """Returns the bits of a weight in a format, without its scales: the convention of ModelOpt's `effective_bits`."""
    row = FORMATS[form]
    return row.storage.bits if row.storage else row.bits


def allocate(
    groups: Sequence[Group],
    formats: Sequence[str],
    effective_bits: float,
    times: Mapping[str, float] | None = None,
    max_time: float = 1.0,
) -> dict[str, str]:
    """Returns the format of every layer that minimises the total harm within a mean number of bits a weight, and
    within a mean time.

    Exact: a 0/1 program with one choice a group, solved with HiGHS (`scipy.optimize.milp`). The formulation is
    that of ModelOpt's AutoQuantize and of Yao et al. 2021, "HAWQ-V3".

    Args:
        times: what a weight takes in each format, as a share of what it takes in 16 bits; None where time is no object.

    Raises:
        Failure: `unsupported`, no assignment meets both.
    """
    formats = sorted(formats)
    harm = np.array([[group.harm[f] for f in formats] for group in groups])
    weights = np.array([group.weights for group in groups], dtype=float)
    one_each = np.kron(np.eye(len(groups)), np.ones(len(formats)))

    def mean(of_format: Mapping[str, float], most: float) -> LinearConstraint:
        cost = weights[:, None] * np.array([of_format[f] for f in formats]) / weights.sum()
        return LinearConstraint(cost.ravel()[None], -np.inf, most + 1e-9)

    bits = {form: bits_of(form) for form in formats}
    limits = [mean(bits, effective_bits), *([mean(times, max_time)] if times else [])]
    solution = milp(
        c=harm.ravel(),
        integrality=np.ones(harm.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), *limits],
    )
    if solution.x is None:
        raise Failure("unsupported", _impossible(bits, effective_bits, times, max_time))
    choice = solution.x.reshape(harm.shape).argmax(axis=1)
    return {layer: formats[c] for group, c in zip(groups, choice, strict=True) for layer in group.layers}


def _impossible(
    bits: Mapping[str, float], effective_bits: float, times: Mapping[str, float] | None, max_time: float
) -> str:
    least = min(bits.values())
    if effective_bits < least or not times:
        return f"effective_bits: {effective_bits} is below the smallest format's {least:g}"
    fastest = min(times.values())
    if max_time < fastest:
        return f"max_time: {max_time:g} is below the fastest format's {fastest:.2f}; write at least that"
    return f"max_time: nothing takes {max_time:g} of the time within {effective_bits:g} bits; raise one of them"
