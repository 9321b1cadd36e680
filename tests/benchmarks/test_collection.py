"""benchmarks/collection.py: no interleaving loses a tree, and one that could is noticed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def collection(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("collection")


def test_no_schedule_loses_a_tree(collection):
    """A few of the hundred thousand that benchmarks/results tells of."""
    with collection.in_this_world():
        assert sum(collection.schedule(seed) for seed in range(400)) > 20_000


@pytest.mark.parametrize("part", ["fence", "lease", "marker"])
def test_each_part_of_the_protocol_is_needed(collection, part):
    with collection.in_this_world(), collection.without(part), pytest.raises(collection.Lost):
        for seed in range(400):
            collection.schedule(seed, part)
