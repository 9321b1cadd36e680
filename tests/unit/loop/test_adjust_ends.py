"""Never the same recipe twice; always an end."""

import itertools
import random

import pytest

from trimtab.judge import FAILURE_CLASSES
from trimtab.loop.adjust import next_recipe
from trimtab.loop.state import Brief
from trimtab.recipe import Recipe

from .ladders import DEMO, H100, KV, failed, quantized, rung, student

OUTCOMES = (*FAILURE_CLASSES, "indeterminate")
LADDERS = {
    "demo": DEMO,
    "h100": H100,
    "kv": KV,
    "pruned": [
        student(8),
        student(4),
        rung("{prune: {method: width, ffn: 0.5, kv_groups: 2}, distill: {tokens: 1000}}"),
        rung("prune: {method: magnitude, sparsity: 0.9}"),
        rung("prune: {method: sparsegpt, pattern: '2:4'}"),
        rung("{prune: {method: movement, sparsity: 0.85}, distill: {tokens: 1000}}"),
        rung("{prune: {method: movement, penalty: 40}, distill: {tokens: 1000}}"),
        *quantized("bf16+kv"),
    ],
}


def play(rungs, causes) -> int:
    """Runs the loop to its end and returns the number of attempts."""
    history = []
    for cause, ratio in causes:
        found, sentence = next_recipe(rungs, history)
        again = next_recipe(list(rungs), [Brief.parse(brief.to_json()) for brief in history])
        assert (found, sentence) == again, "the same history gives the same answer, also after JSON"
        assert sentence
        if found is None:
            return len(history)
        assert found.recipe.digest not in {brief.recipe.digest for brief in history}
        assert Recipe.parse(found.recipe.to_json()) == found.recipe
        assert found.why
        history.append(failed(found, cause, ratio))
    raise AssertionError(f"no end after {len(history)} attempts")


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("cause", OUTCOMES)
def test_ends_when_everything_fails_alike(name, cause):
    assert play(LADDERS[name], itertools.repeat((cause, None), 60)) <= 4 * len(LADDERS[name])


@pytest.mark.parametrize("name", LADDERS)
def test_never_repeats_and_always_ends(name):
    dice = random.Random(2)
    for _ in range(60):
        ratios = [None, 0.99, 1.02, 1.11, 1.4, 20.0]
        causes = [(dice.choice(OUTCOMES), dice.choice(ratios)) for _ in range(80)]
        play(LADDERS[name], causes)
