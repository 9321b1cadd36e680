"""Which experts a text reaches, and how those are measured that it hardly does.

A router may give an expert few tokens of a calibration text, or none; its inputs would then have no range. The rule
here: an expert with fewer than `LEAST` tokens is run on every token once more, for measuring alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trimtab.runtime.checkpoint.experts import SeparateExperts
from trimtab.runtime.measure.observe import Observation

#: Tokens below which an expert's measurements are those of every token instead.
LEAST = 64


def shares(mixtures: Mapping[str, SeparateExperts], seen: Observation, tokens: int) -> dict[str, list[float]]:
    """Returns for each mixture of experts, by name, the share of the tokens that each of its experts was given."""
    found = {}
    for name, mixture in mixtures.items():
        first = mixture.first_layer
        found[name] = [seen.rows(f"{name}.{number}.{first}") / tokens for number in range(len(mixture))]
    return found


def rare(shares: Mapping[str, list[float]], tokens: int) -> dict[str, list[int]]:
    """Returns the experts of each mixture that were given fewer than `LEAST` tokens."""
    few = {name: [n for n, share in enumerate(each) if share * tokens < LEAST] for name, each in shares.items()}
    return {name: numbers for name, numbers in few.items() if numbers}


def recorded(calibration: Path) -> dict[str, list[int]]:
    """Returns the experts that a calibration found too few tokens for, by their mixture."""
    report = json.loads((calibration / "calibration.json").read_text(encoding="utf-8"))
    return {name: [int(n) for n in few] for name, few in report.get("experts", {}).get("rare", {}).items()}


@contextmanager
def run_on_all(mixtures: Mapping[str, SeparateExperts], chosen: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Runs these experts on every token while the body runs the model, whose outputs stay as they are."""
    for name, numbers in chosen.items():
        mixtures[name].run_on_all = numbers
    try:
        yield
    finally:
        for name in chosen:
            mixtures[name].run_on_all = ()
