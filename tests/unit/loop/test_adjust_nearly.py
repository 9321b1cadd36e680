"""What nearly passed keeps the layers that it harms most in 16 bits."""

import pytest

from trimtab.judge import Interval
from trimtab.loop.adjust import next_recipe
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import Recipe

from .ladders import failed, quantized, title_after


def narrowly(recipe: Rung | Recipe, recovery: float = 0.93, ratio: float = 1.12, cause: str = "accuracy") -> Brief:
    """An attempt that lost so much, of the 0.05 and the factor of 1.1 that it may lose."""
    brief = failed(recipe, cause, ratio)
    kept = Interval(estimate=recovery, low=recovery - 0.01, high=recovery + 0.01)
    return brief.model_copy(update={"verdict": brief.verdict.model_copy(update={"recovery": kept})})


FOUR_BITS = quantized("int4_awq", "int4_gptq", "fp8")


@pytest.mark.parametrize("cause", ["accuracy", "perplexity", "indeterminate"])
def test_what_nearly_passed_keeps_the_layers_that_it_harms_most_in_16_bits(cause):
    first, why = next_recipe(FOUR_BITS, [narrowly(FOUR_BITS[1], cause=cause)])
    assert first.recipe.quantize.exclude_sensitive == 4 and first.recipe.quantize.format == "int4_gptq"
    assert why.endswith("next is the same with the 4 groups of layers that int4_gptq harms most in 16 bits")
    history = [narrowly(FOUR_BITS[1], cause=cause), narrowly(first, cause=cause)]
    second, _ = next_recipe(FOUR_BITS, history)
    assert second.recipe.quantize.exclude_sensitive == 16
    assert title_after(FOUR_BITS, *history, narrowly(second, cause=cause)) == "fp8"


@pytest.mark.parametrize(
    ("ladder", "brief"),
    [
        (FOUR_BITS, narrowly(FOUR_BITS[1], recovery=0.91)),  # loses 0.09 of the 0.05 that it may
        (FOUR_BITS, narrowly(FOUR_BITS[1], ratio=1.2)),
        (quantized("int4_gptq", "mixed 5"), narrowly(FOUR_BITS[1])),  # gives each layer the bits that it needs
    ],
)
def test_what_is_far_off_or_has_a_mixed_rung_before_it_goes_on_with_the_ladder(ladder, brief):
    assert next_recipe(ladder, [brief])[0].recipe.quantize.exclude_sensitive == 0


def test_a_remedy_that_leaves_nothing_to_quantize_is_not_tried():
    found, _ = next_recipe(FOUR_BITS, [narrowly(FOUR_BITS[1])], lambda recipe: not recipe.quantize.exclude_sensitive)
    assert found.recipe.title == "fp8"
