"""Mixed precision: the best assignment within a budget, against trying them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.base.errors import Failure
from trimtab.components.quantization.mixed.allocation import BITS, Group, allocate

groups = st.lists(
    st.tuples(st.integers(1, 1000), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=7
).map(
    lambda rows: [
        Group((f"layer.{n}.a", f"layer.{n}.b"), weights, {"int4_gptq": four, "int8_wo": eight})
        for n, (weights, four, eight) in enumerate(rows)
    ]
)


def harm(problem: list[Group], assignment: dict[str, str]) -> float:
    return sum(group.harm[assignment[group.layers[0]]] for group in problem)


def effective_bits(problem: list[Group], assignment: dict[str, str]) -> float:
    bits = sum(BITS[assignment[group.layers[0]]] * group.weights for group in problem)
    return bits / sum(group.weights for group in problem)


def every(problem: list[Group]):
    for choice in itertools.product(BITS, repeat=len(problem)):
        yield {layer: form for group, form in zip(problem, choice, strict=True) for layer in group.layers}


@settings(max_examples=150, deadline=None)
@given(groups, st.floats(4, 8))
def test_as_good_as_trying_all(problem, budget):
    found = allocate(problem, budget)
    best = min(harm(problem, a) for a in every(problem) if effective_bits(problem, a) <= budget + 1e-9)
    assert harm(problem, found) == pytest.approx(best, abs=1e-5, rel=1e-5)
    assert effective_bits(problem, found) <= budget + 1e-6
    assert all(found[group.layers[0]] == found[group.layers[1]] for group in problem), "fused layers share a format"


@pytest.mark.parametrize(
    ("budget", "formats"),
    [
        (8.0, ["int8_wo", "int8_wo", "int8_wo"]),
        (6.0, ["int8_wo", "int4_gptq", "int4_gptq"]),  # half of the weights, where INT4 harms most
        (4.0, ["int4_gptq", "int4_gptq", "int4_gptq"]),
    ],
)
def test_by_hand(budget, formats):
    rows = [(200, 9.0), (100, 1.0), (100, 2.0)]
    harms = [{"int4_gptq": four, "int8_wo": 0.1} for _, four in rows]
    problem = [Group((f"l{n}",), weights, harms[n]) for n, (weights, _) in enumerate(rows)]
    assert list(allocate(problem, budget).values()) == formats


def test_a_budget_that_nothing_meets():
    problem = [Group(("l",), 10, {"int4_gptq": 1.0, "int8_wo": 0.0})]
    with pytest.raises(Failure, match="effective_bits: 3.5 is below the smallest format's 4") as caught:
        allocate(problem, 3.5)
    assert caught.value.failure_class == "unsupported"
