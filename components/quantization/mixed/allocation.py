"""Which layer gets how many bits: a small integer program over measured sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.recipe import MIXED_FORMATS


@dataclass(frozen=True)
class Group:
    """Layers that must share a format (an engine fuses them), their weights, and the harm of each format.

    `harm` maps a format's name to its measured sensitivity: the expected rise of the loss, summed over the
    calibration windows; only differences inside a run matter.
    """

    layers: tuple[str, ...]
    weights: int
    harm: dict[str, float]


#: Bits of a weight in each format, without its scales: the convention of ModelOpt's `effective_bits`.
BITS = {form: FORMATS[form].storage.bits for form in MIXED_FORMATS}


def allocate(groups: Sequence[Group], effective_bits: float) -> dict[str, str]:
    """Returns the format of every layer that minimises the total harm within a mean number of bits a weight.

    Exact: a 0/1 program with one choice a group, solved with HiGHS (`scipy.optimize.milp`). The formulation is
    that of ModelOpt's AutoQuantize and of Yao et al. 2021, "HAWQ-V3".

    Raises:
        Failure: `unsupported`, the budget is below the smallest format.
    """
    formats = sorted(BITS)
    harm = np.array([[group.harm[f] for f in formats] for group in groups])
    weights = np.array([group.weights for group in groups], dtype=float)
    cost = weights[:, None] * np.array([BITS[f] for f in formats]) / weights.sum()
    one_each = np.kron(np.eye(len(groups)), np.ones(len(formats)))
    solution = milp(
        c=harm.ravel(),
        integrality=np.ones(harm.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost.ravel()[None], -np.inf, effective_bits + 1e-9),
        ],
    )
    if solution.x is None:
        least = min(BITS.values())
        raise Failure(
            "unsupported", f"effective_bits: {effective_bits} is below the smallest format's {least:g}"
        )
    choice = solution.x.reshape(harm.shape).argmax(axis=1)
    return {layer: formats[c] for group, c in zip(groups, choice, strict=True) for layer in group.layers}
