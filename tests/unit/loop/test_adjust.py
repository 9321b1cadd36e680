"""What follows each kind of failure."""

import pytest

from trimtab.judge import Verdict
from trimtab.loop.adjust import next_recipe
from trimtab.loop.state import Brief
from trimtab.recipe import Recipe

from .ladders import DEMO, H100, KV, failed, quantized, rung, title_after


def test_the_first_rung_first():
    found, sentence = next_recipe(DEMO, [])
    assert found is DEMO[0] and sentence == "the first rung of the ladder"


def test_the_baseline_is_no_attempt():
    assert next_recipe(DEMO, [failed(Recipe(), "baseline")])[0] is DEMO[0]


def test_accepted_stops():
    assert next_recipe(DEMO, [failed(DEMO[0], "accepted")]) == (None, "int4_rtn was accepted")


def test_an_empty_ladder_stops():
    assert next_recipe([], []) == (None, "the ladder is empty")


@pytest.mark.parametrize(
    ("rungs", "last", "cause", "expected"),
    [
        (DEMO, 0, "accuracy", "int4_awq"),
        (DEMO, 0, "perplexity", "int4_awq"),
        (DEMO, 1, "indeterminate", "mixed 5 bits"),
        (DEMO, 4, "accuracy", "mixed 6.5 bits"),  # 5 and 5.5 bits take more away, though untried
        (DEMO, 7, "accuracy", None),  # the safest: all others take more away
        (H100, 1, "accuracy", "fp8"),  # only the one that spares down_proj takes less away
        (H100, 0, "kv_cache_accuracy", "fp8"),
        (H100, 0, "accuracy", "fp8"),
        (H100, 0, "unsupported", "fp8"),  # the pair may be at fault: first without the KV cache
        (H100, 1, "unsupported", "int4_awq"),  # then no FP8 at all
        (H100, 2, "no_gain", "fp8 + fp8 KV"),  # FP8 also computes in eight bits
        (H100, 1, "no_gain", "fp8 + fp8 KV"),  # a smaller KV cache is another way to gain
        (H100, 0, "no_gain", "int4_awq"),  # FP8 without the KV cache would gain less
        (H100, 3, "accuracy", "fp8 + fp8 KV"),  # less is pruned on the ladder itself
        (KV, 0, "kv_cache_accuracy", "fp8"),  # off the ladder: the KV cache alone is dropped
        (KV, 0, "accuracy", "int8_sq + int8 KV"),  # harsher weights, a milder KV cache
        (KV, 2, "accuracy", "int8_wo + fp8 KV"),  # INT8 with SmoothQuant is harsher, its KV cache no milder
        (KV[1:], 1, "no_gain", None),  # INT8 saves as much of the KV cache as FP8
        (KV[:4], 1, "no_gain", "fp8 + nvfp4 KV"),  # saves more of the KV cache
        (KV[1:4], 0, "no_gain", None),  # no other has a smaller KV cache or fewer bits
        (KV, 3, "degenerate_output", "int8_wo"),
        (DEMO, 4, "export_damaged", "int4_rtn"),  # nothing mixed
        (DEMO, 0, "degenerate_output", "int4_awq"),
        (H100, 0, "degenerate_output", "fp8"),  # a quantized KV cache is the usual culprit
        (DEMO, 7, "no_gain", "int4_rtn"),
        (DEMO, 0, "no_gain", None),  # nothing has fewer bits
    ],
)
def test_next(rungs, last, cause, expected):
    assert title_after(rungs, failed(rungs[last], cause)) == expected


def test_a_safer_recipe_after_fp8_spares_down_proj():
    found, _ = next_recipe(H100, [failed(H100[0], "accuracy"), failed(H100[1], "accuracy")])
    assert found is H100[-1]


def test_no_gain_climbs_to_structured_pruning():
    history = [failed(H100[0], "no_gain")]
    assert title_after(H100, *history) == "int4_awq"
    history.append(failed(H100[2], "accuracy"))
    assert next_recipe(H100, history)[0] is H100[3]


def test_a_remedy_that_stands_on_the_ladder_is_that_rung():
    assert next_recipe(H100, [failed(H100[0], "kv_cache_accuracy")])[0] is H100[1]


def test_a_remedy_off_the_ladder_is_a_new_rung():
    only = quantized("fp8+kv", "int4_awq+kv")
    found, sentence = next_recipe(only, [failed(only[0], "kv_cache_accuracy")])
    assert found not in only and found.recipe.quantize.kv_cache == "none"
    assert found.why == "the same with the KV cache in 16 bits"
    assert sentence == f"fp8 + fp8 KV failed (kv_cache_accuracy): next is {found.why}"


def test_a_milder_kv_cache_stays_open():
    """What NVFP4 loses says nothing of FP8, which has twice the bits; INT8 has as many as FP8."""
    rungs = quantized("bf16+nvfp4", "bf16+int8", "bf16+kv", "int4_awq")
    assert title_after(rungs, failed(rungs[0], "kv_cache_accuracy")) == "bf16 + int8 KV"
    history = [failed(rung, "kv_cache_accuracy") for rung in rungs[:2]]
    found, sentence = next_recipe(rungs, history)
    assert found is rungs[3]
    assert sentence.endswith("next is int4_awq, which takes less from the KV cache")


@pytest.mark.parametrize(("kv_cache", "smaller"), [("none", True), ("fp8", True), ("int8", True), ("nvfp4", False)])
def test_what_does_not_fit_in_nvfp4_fits_in_no_larger_kv_cache(kv_cache, smaller):
    recipe = "{{quantize: {{format: fp8, kv_cache: {}}}, engine: {{max_batch_size: 1, max_seq_len: 512}}}}"
    rungs = [rung(recipe.format("nvfp4")), rung(recipe.format(kv_cache))]
    if smaller:
        assert title_after(rungs, failed(rungs[0], "does_not_fit")) is None
        assert title_after(rungs, failed(rungs[1], "does_not_fit")) == "fp8 + nvfp4 KV"


def test_without_its_kv_cache_bf16_would_be_the_baseline():
    only = quantized("bf16+kv", "int8_wo")
    assert title_after(only, failed(only[0], "kv_cache_accuracy")) == "int8_wo"


def test_does_not_fit_shrinks_the_batch_once_then_the_weights():
    rungs = quantized("int8_wo", "fp8", "int4_awq")
    first, _ = next_recipe(rungs, [failed(rungs[0], "does_not_fit")])
    assert first.recipe.engine.max_batch_size == 2 and first.why == "the same with a batch of 2"
    history = [failed(rungs[0], "does_not_fit"), failed(first, "does_not_fit")]
    assert title_after(rungs, *history) == "int4_awq"  # fp8 has as many bytes


def test_does_not_fit_shortens_the_context_of_a_batch_of_one():
    only = [rung("{quantize: {format: int8_wo}, engine: {max_batch_size: 1, max_seq_len: 4096}}")]
    assert next_recipe(only, [failed(only[0], "does_not_fit")])[0].recipe.engine.max_seq_len == 2048


@pytest.mark.parametrize(
    ("stage", "failing", "others", "open"),
    [
        ("quantize", "int4_gptq", ("mixed 5", "int4_awq"), "int4_awq"),  # both measure Gram matrices
        ("sensitivity", "mixed 5", ("mixed 6", "int4_gptq"), "int4_gptq"),
        ("calibrate", "int4_awq", ("int8_sq", "int8_wo"), "int8_wo"),  # which is not calibrated
        ("quantize", "int4_gptq", ("int4_gptq+kv", "int4_awq"), "int4_awq"),
    ],
)
def test_memory_that_lacked_before_serving_rules_out_what_asks_for_it_again(stage, failing, others, open):
    verdict = Verdict(outcome="rejected", failure_class="does_not_fit", reason="killed", stage=stage)
    rungs = quantized(failing, *others)
    found, sentence = next_recipe(rungs, [Brief(recipe=rungs[0].recipe, verdict=verdict)])
    assert found.recipe.title == open
    assert f"failed (does_not_fit in {stage})" in sentence


def test_a_changed_recipe_loses_its_name():
    named = [rung("{name: mine, quantize: {format: fp8, kv_cache: fp8}}")]
    assert next_recipe(named, [failed(named[0], "kv_cache_accuracy")])[0].recipe.title == "fp8"


def test_the_sentence_at_the_end_counts():
    history = [failed(DEMO[7], "accuracy")]
    assert next_recipe(DEMO, history)[1] == (
        "int8_wo failed (accuracy): nothing is left to try, 1 tried; "
        "the verdicts rule out the other 7 of the ladder"
    )
