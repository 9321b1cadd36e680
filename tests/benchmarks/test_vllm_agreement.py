"""benchmarks/vllm_agreement.py: what it says of two engines' answers, told from answers made up here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
WINDOWS, PAIRS = 24, 400


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("vllm_agreement")


def answers(right: int = PAIRS * 3 // 4, worse: float = 0.0, otherwise: dict[int, float] | None = None) -> dict:
    """Of an engine that decides the first pairs rightly, by a nat each, and some otherwise, by what is given."""
    margins = [1.0 if pair < right else -1.0 for pair in range(PAIRS)]
    margins = [(otherwise or {}).get(pair, margin) for pair, margin in enumerate(margins)]
    return {
        "sentences": [likelihood for margin in margins for likelihood in (-20 + margin, -20.0)],
        "nll": [100.0 + window + worse for window in range(WINDOWS)],
        "tokens": 50,
        "next": [-1.0, -2.0 - worse],
        "likeliest": [True, worse == 0],
        "perplexity": 9.0,
    }


def test_where_engines_differ_the_reference_says_which_is_right(agreement):
    found = {
        "torch": answers(otherwise={0: -0.25}),
        "vllm": answers(otherwise={399: 0.5}, worse=0.5),
        "reference": answers(otherwise={399: 0.1}),
    }
    told = agreement.compare(found, {})
    assert told["pairs"]["count"] == PAIRS and told["pairs"]["differ"] == 2
    assert told["pairs"]["right"] == {"torch": 0, "vllm": 2}
    assert told["pairs"]["which"] == [
        {"pair": 0, "torch": -0.25, "vllm": 1.0, "reference": 1.0},
        {"pair": 399, "torch": -1.0, "vllm": 0.5, "reference": 0.1},
    ]
    assert told["likeliest tokens"] == {"count": 2, "differ": 1, "right": {"torch": 1, "vllm": 0}}
    assert told["nll: torch and vllm"] == {"max": 0.5, "mean": 0.5, "count": WINDOWS}
    assert told["next: vllm and reference"] == {"max": 0.5, "mean": 0.25, "count": 2}
    assert "verdicts" not in told, "BF16 has none"


@pytest.mark.parametrize(
    ("right", "worse", "outcome"),
    [(300, 0.0, "accepted"), (220, 0.0, "rejected"), (300, 20.0, "rejected")],
)
def test_each_engine_is_judged_against_its_own_baseline(agreement, right, worse, outcome):
    plain = {"torch": answers(), "vllm": answers(right=299)}
    found = {"torch": answers(right, worse), "vllm": answers(300)}
    told = agreement.compare(found, plain)["verdicts"]
    assert told == {"torch": outcome, "vllm": "accepted", "agree": outcome == "accepted"}


def test_without_blimp_there_is_no_verdict(agreement):
    plain, found = ({**answers(), "sentences": [], "perplexity": perplexity} for perplexity in (10.0, 11.0))
    assert agreement.verdict_on(plain, found) == {"perplexity_ratio": 1.1, "outcome": "not judged: give --blimp"}
