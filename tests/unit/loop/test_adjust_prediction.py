"""The perplexity ratio that is predicted of a rung from those measured, and rungs that are skipped for it."""

import math

import pytest

from trimtab.loop.adjust import next_recipe, predicted_ratio

from .ladders import DEMO, failed, quantized, rung

# SmolLM2-135M under ModelOpt 0.47 (issue 2): dense 25.63, INT4 round-to-nearest 35.77, INT4 AWQ 32.44, and a
# ratio of 1.11 in mixed precision (taken as 6 bits here, for round numbers).
RTN, AWQ, MIXED_6 = 35.77 / 25.63, 32.44 / 25.63, 1.11


@pytest.mark.parametrize(
    ("measured", "bits", "expected"),
    [
        # one point, halved in one bit: ln 1.3956 = 0.3333; at 6 bits a quarter of it
        ({0: RTN}, 6, math.exp(0.33334 / 4)),
        ({1: AWQ}, 5, math.exp(0.23562 / 2)),
        # AWQ is the end of the line of mixed precision, so round-to-nearest is left out beside it
        ({0: RTN, 1: AWQ}, 6, math.exp(0.23562 / 4)),
        # two points: 0.23562 at 4 bits and 0.10436 at 6, so sqrt(0.10436 / 0.23562) = 0.66552 a bit
        ({1: AWQ, 4: MIXED_6}, 5, math.exp(0.23562 * 0.66552)),
        ({0: RTN, 1: AWQ, 4: MIXED_6}, 7, math.exp(0.10436 * 0.66552)),
        # noise that rises with the bits: the guess stands, from the most bits measured
        ({2: 1.05, 4: 1.06}, 7, math.exp(math.log(1.06) / 2)),
        ({0: 0.99}, 6, None),  # no loss was measured: nothing to extrapolate
        ({}, 6, None),
    ],
)
def test_predicted_ratio(measured, bits, expected):
    history = [failed(DEMO[index], "perplexity", ratio) for index, ratio in measured.items()]
    found = predicted_ratio(quantized(f"mixed {bits}")[0].recipe, history)
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-3))


def test_prediction_ignores_other_models():
    pruned = rung("{prune: {method: depth, blocks: 2}, quantize: {format: int4_rtn}}")
    assert predicted_ratio(DEMO[4].recipe, [failed(pruned, "perplexity", 1.5)]) is None
    assert predicted_ratio(DEMO[7].recipe, [failed(DEMO[0], "perplexity", 1.5)]) is None


def test_rungs_that_would_clearly_fail_are_skipped_and_named():
    history = [failed(DEMO[0], "perplexity", RTN), failed(DEMO[1], "perplexity", AWQ)]
    found, sentence = next_recipe(DEMO, history)
    assert found is DEMO[3]  # predicted 1.125 at 5 bits, 1.087 at 5.5
    assert sentence == (
        "int4_awq failed (perplexity): next is mixed 5.5 bits, which takes less away; skipped on the way, with "
        "the perplexity ratios predicted: mixed 5 bits 1.13"
    )
    history.append(failed(found, "perplexity", 1.15))
    # ln 1.15 = 0.1398 at 5.5 bits, a factor 0.7060 a bit: 1.125 at 6 bits, 1.10 at 6.5
    found, sentence = next_recipe(DEMO, history)
    assert found is DEMO[5] and "mixed 6 bits 1.12" in sentence


def test_nothing_is_skipped_that_is_not_predicted_to_fail():
    history = [failed(DEMO[0], "perplexity", 1.12)]  # 1.06 at 5 bits
    history.append(failed(DEMO[1], "perplexity", 1.11))
    assert next_recipe(DEMO, history)[0] is DEMO[2]


def test_the_last_rung_is_never_skipped():
    rungs = quantized("int4_rtn", "mixed 5", "mixed 5.5")
    assert next_recipe(rungs, [failed(rungs[0], "perplexity", 9.0)])[0] is rungs[-1]
