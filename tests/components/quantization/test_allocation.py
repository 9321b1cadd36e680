"""Mixed precision: the best assignment within a budget, against trying them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.base.errors import Failure
from trimtab.catalog import layer_times
from trimtab.components.quantization.mixed.allocation import Group, allocate, bits_of

BITS = {"int4_gptq": 4, "int8_wo": 8}
FORMS = ("nvfp4_wo", "fp8", "bf16")
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
    found = allocate(problem, BITS, budget)
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
    assert list(allocate(problem, BITS, budget).values()) == formats


def test_a_budget_that_nothing_meets():
    problem = [Group(("l",), 10, {"int4_gptq": 1.0, "int8_wo": 0.0})]
    with pytest.raises(Failure, match="effective_bits: 3.5 is below the smallest format's 4") as caught:
        allocate(problem, BITS, 3.5)
    assert caught.value.failure_class == "unsupported"


timed = st.lists(
    st.tuples(st.integers(1, 1000), *[st.floats(0, 100)] * 3), min_size=1, max_size=6
).map(lambda rows: [Group((f"layer.{n}",), size, dict(zip(FORMS, harms, strict=True)))
                    for n, (size, *harms) in enumerate(rows)])  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(timed, st.floats(4, 16), st.floats(0.5, 1.2), st.sampled_from([1, 206, 1000]))
def test_two_costs_are_both_kept_and_nothing_better_is(problem, budget, most, step_tokens):
    times = layer_times.relative(FORMS, step_tokens)
    total = sum(group.weights for group in problem)

    def costs(chosen: tuple[str, ...]) -> tuple[float, float]:
        pairs = [*zip(problem, chosen, strict=True)]
        return tuple(sum(cost(form) * g.weights for g, form in pairs) / total for cost in (bits_of, times.get))

    def allowed(chosen: tuple[str, ...], slack: float) -> bool:
        return all(cost <= limit + slack for cost, limit in zip(costs(chosen), (budget, most), strict=True))

    every = [*itertools.product(FORMS, repeat=len(problem))]
    if not any(allowed(chosen, 1e-9) for chosen in every):
        with pytest.raises(Failure, match="max_time: "):
            allocate(problem, FORMS, budget, times, most)
        return
    found = tuple(allocate(problem, FORMS, budget, times, most).values())
    best = min(sum(g.harm[form] for g, form in zip(problem, chosen, strict=True))
               for chosen in every if allowed(chosen, 1e-9))  # fmt: skip
    assert allowed(found, 1e-6)
    assert sum(g.harm[f] for g, f in zip(problem, found, strict=True)) == pytest.approx(best, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(("step_tokens", "expected"), [
    # reading alone: 4.5, 8 and 16 bits
    (1, {"nvfp4_wo": 4.5 / 16, "nvfp4": 4.5 / 16, "fp8": 0.5, "bf16": 1.0, "int4_gptq": 4.125 / 16}),
    # where 16 bits are read and multiplied in as much time, weights alone save nothing, and FP4 a quarter is left
    (206, {"nvfp4_wo": 1.0, "nvfp4": 4.5 / 16, "fp8": 0.5, "bf16": 1.0, "int4_gptq": 1.0}),
    (2060, {"nvfp4_wo": 1.0, "nvfp4": 0.25, "fp8": 0.5, "bf16": 1.0, "int4_gptq": 1.0}),
])  # fmt: skip
def test_the_time_of_a_layer_is_that_of_reading_or_of_multiplying_it(step_tokens, expected):
    assert layer_times.relative(expected, step_tokens) == pytest.approx(expected)
