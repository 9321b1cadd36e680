"""What follows the failure of a recipe that prunes or trains: it is eased, taught longer, then given up."""

import pytest

from trimtab.judge import Verdict
from trimtab.loop.adjust import next_recipe
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import Recipe

from .ladders import failed, narrow, quantized, rung, student, title_after, trained_with_rounding


def test_a_training_that_did_not_fit_is_made_lighter_and_then_left_out():
    """Its serving batch, which has nothing to do with it, stays."""
    rungs = [narrow("ffn: 0.25"), narrow("ffn: 0.125"), *quantized("fp8")]
    whole = rungs[0].recipe.model_copy(
        update={"distill": rungs[0].recipe.distill.model_copy(update={"batch_size": 16})}
    )
    rungs[0] = Rung(recipe=whole, why="for the test")
    history, found = [], []
    while (following := next_recipe(rungs, history)[0]) is not rungs[2]:
        distill = following.recipe.distill
        found.append((following.recipe.prune.title, distill.windows_at_once, distill.activation_checkpointing))
        assert following.recipe.engine == whole.engine
        reason = "distill ran out of memory: CUDA out of memory"
        verdict = Verdict(outcome="rejected", failure_class="does_not_fit", reason=reason, stage="distill")
        history.append(Brief(recipe=following.recipe, verdict=verdict))
    # the other student is larger, and four of its windows are more than the one that was too much
    assert found == [("-25 % FFN", 16, False), ("-25 % FFN", 4, False), ("-25 % FFN", 1, True)]
    sentence = next_recipe(rungs, history)[1]
    assert sentence.endswith("failed (does_not_fit in distill): next is fp8, which needs less memory")


def test_a_diverged_training_is_tried_once_at_a_tenth_of_the_rate():
    rungs = [student(8), student(4)]
    slower, _ = next_recipe(rungs, [failed(rungs[0], "training_diverged")])
    assert slower.recipe.distill.learning_rate == pytest.approx(1e-5)
    assert slower.recipe.prune == rungs[0].recipe.prune
    history = [failed(rungs[0], "training_diverged"), failed(slower, "training_diverged")]
    assert next_recipe(rungs, history)[0] is rungs[1]


def test_pruning_is_eased_before_it_is_given_up():
    rungs = [student(8), student(4), *quantized("fp8")]
    history = [failed(rungs[0], "accuracy")]
    assert next_recipe(rungs, history)[0] is rungs[1]  # fewer blocks, on the ladder
    history.append(failed(rungs[1], "accuracy"))
    longer, _ = next_recipe(rungs, history)
    assert longer.recipe.distill.tokens == 4000 and longer.recipe.prune.blocks == 4
    history.append(failed(longer, "accuracy"))
    fewer, _ = next_recipe(rungs, history)
    assert fewer.recipe.prune.blocks == 2
    history.append(failed(fewer, "accuracy"))
    assert next_recipe(rungs, history)[0].recipe.prune.blocks == 1
    history.append(failed(next_recipe(rungs, history)[0], "accuracy"))
    assert title_after(rungs, *history) == "fp8"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_is_loosened_and_then_sparsity_halved(method):
    rungs = [rung(f"prune: {{method: {method}, pattern: '2:4'}}"), *quantized("int8_wo")]
    history, titles = [], []
    while not titles or titles[-1] != "int8_wo":
        found, _ = next_recipe(rungs, history)
        titles.append(found.recipe.title)
        assert Recipe.parse(found.recipe.to_json()) == found.recipe, "what a remedy makes is a recipe that can be read"
        history.append(failed(found, "accuracy"))
    assert titles == [f"{method} {amount}" for amount in ("2:4", "50 %", "25 %", "12.5 %")] + ["int8_wo"]


@pytest.mark.parametrize(
    ("fails", "other", "ruled_out"),
    [
        ("wanda, sparsity: 0.5", "wanda, sparsity: 0.6", True),
        ("wanda, sparsity: 0.5", "wanda, sparsity: 0.4", False),
        ("wanda, sparsity: 0.5", "magnitude, sparsity: 0.5", True),
        ("wanda, sparsity: 0.5", "sparsegpt, sparsity: 0.5", False),
        ("wanda, sparsity: 0.5", "wanda, sparsity: 0.5, allocation: sensitivity", False),
        ("wanda, sparsity: 0.5, allocation: sensitivity", "wanda, sparsity: 0.5", True),
        ("wanda, sparsity: 0.5", "wanda, pattern: '4:8'", True),
        ("wanda, pattern: '4:8'", "wanda, pattern: '2:4'", True),
        ("wanda, pattern: '2:4'", "wanda, pattern: '4:8'", False),
        ("wanda, pattern: '2:4'", "wanda, pattern: '1:4'", True),
        ("sparsegpt, pattern: '2:4'", "magnitude, pattern: '2:4'", True),
        ("sparsegpt, pattern: '2:4'", "magnitude, sparsity: 0.5", False),  # freer, but chosen more blindly
    ],
)
def test_what_a_sparse_failure_rules_out(fails, other, ruled_out):
    rungs = [rung(f"prune: {{method: {settings}}}") for settings in (fails, other)]
    history = [failed(rungs[0], "accuracy")]
    while (found := next_recipe(rungs, history)[0]) and found not in rungs:  # the remedies come first
        history.append(failed(found, "kv_cache_accuracy"))
    assert (found is None) == ruled_out


def test_a_pattern_that_cannot_be_is_no_word_against_other_zeros():
    rungs = [rung(f"prune: {{method: wanda, {amount}}}") for amount in ("pattern: '2:4'", "sparsity: 0.5")]
    assert next_recipe(rungs, [failed(rungs[0], "unsupported")])[0] is rungs[1]


def test_training_with_rounded_weights_is_open_after_rounding_failed_and_then_prolonged_once():
    rungs = [*quantized("int4_rtn", "int4_awq"), trained_with_rounding(), *quantized("int8_wo")]
    history, found = [failed(rungs[0], "perplexity"), failed(rungs[1], "perplexity")], []
    while (following := next_recipe(rungs, history)[0]) is not rungs[3]:
        found.append(following.recipe.distill.tokens)
        history.append(failed(following, "perplexity"))
    assert found == [1000, 4000]


@pytest.mark.parametrize(
    ("fails", "other", "open"),
    [
        (trained_with_rounding(), quantized("int4_rtn")[0], False),  # without it, it is worse
        (trained_with_rounding(), quantized("int4_gptq")[0], True),
        (quantized("int8_wo")[0], trained_with_rounding(), True),  # which may make up for more than INT8 takes
    ],
)
def test_what_training_with_rounded_weights_rules_out(fails, other, open):
    longer = trained_with_rounding(4000)
    history = [failed(longer, "kv_cache_accuracy"), failed(fails, "accuracy")]
    assert (next_recipe([fails, other], history)[0] is other) == open


def test_width_pruning_is_taught_longer_then_halved():
    rungs = [narrow("ffn: 0.25, kv_groups: 3, hidden: 0.08"), *quantized("fp8")]
    history = [failed(rungs[0], "accuracy")]
    found = []
    while (following := next_recipe(rungs, history)[0]) and following is not rungs[1]:
        found.append((following.recipe.distill.tokens, following.recipe.prune.title))
        history.append(failed(following, "accuracy"))
    assert found == [
        (4000, "-25 % FFN, -3 KV groups, -8 % hidden"),
        (4000, "-12.5 % FFN, -1 KV group"),  # half of 8 % of the channels makes no model smaller
        (4000, "-6.25 % FFN"),
    ]
    assert following is rungs[1], "then a format without pruning"


def test_the_ladder_goes_on_with_less_width_by_itself():
    rungs = [narrow("ffn: 0.25, hidden: 0.125"), narrow("ffn: 0.25")]
    assert next_recipe(rungs, [failed(rungs[0], "perplexity")])[0] is rungs[1]


@pytest.mark.parametrize(
    ("first", "second", "open"),
    [
        (narrow("ffn: 0.25"), narrow("ffn: 0.5"), False),
        (narrow("ffn: 0.25"), narrow("ffn: 0.25, kv_groups: 1"), False),
        (narrow("ffn: 0.25"), narrow("kv_groups: 1"), True),
        (narrow("ffn: 0.25"), student(4), True),  # depth and width break different things
        (student(4), narrow("ffn: 0.25"), True),
        (narrow("ffn: 0.25", tokens=9), narrow("ffn: 0.25"), True),  # taught longer
    ],
)
def test_what_a_width_that_was_too_much_rules_out(first, second, open):
    following, _ = next_recipe([first, second], [failed(first, "accuracy"), failed(quantized("bf16")[0], "no_gain")])
    assert (following is second) == open


def test_a_narrower_model_gains_and_needs_less():
    rungs = [*quantized("fp8"), narrow("kv_groups: 2")]
    assert next_recipe(rungs, [failed(rungs[0], "no_gain")])[0] is rungs[1]
    tight = [rung(f"{{prune: {{method: width, ffn: {share}}}, engine: {{max_batch_size: 1, max_seq_len: 512}}}}")
             for share in (0.5, 0.25)]  # fmt: skip
    assert next_recipe(tight, [failed(tight[0], "does_not_fit")])[0] is None
    assert next_recipe(tight, [failed(tight[1], "does_not_fit")])[0] is tight[0]


def test_a_remedy_that_the_target_cannot_run_is_passed_over():
    rungs = [narrow("ffn: 0.25"), *quantized("int8_wo")]
    taught = rungs[0].recipe.distill.tokens * 4
    history = [failed(rungs[0], "accuracy")]
    found, _ = next_recipe(rungs, history, lambda recipe: recipe.distill.tokens != taught)
    assert found.recipe.prune.title == "-12.5 % FFN"
    assert next_recipe(rungs, history, lambda recipe: False)[0] is rungs[1]


def test_sparsity_is_halved():
    rungs = [rung("prune: {method: magnitude, sparsity: 0.5}"), *quantized("int8_wo")]
    found, _ = next_recipe(rungs, [failed(rungs[0], "accuracy")])
    assert found.recipe.prune.sparsity == 0.25


def test_movement_pruning_is_eased_before_it_is_given_up():
    """More tokens once, then twice the weights until half are kept."""
    rungs = [rung("{prune: {method: movement, sparsity: 0.85}, distill: {tokens: 1000}}"), *quantized("fp8")]
    history, tried = [failed(rungs[0], "accuracy")], []
    while (found := next_recipe(rungs, history)[0]) is not rungs[1]:
        tried.append((found.recipe.distill.tokens, found.recipe.prune.sparsity))
        history.append(failed(found, "accuracy"))
    assert tried == [(4000, 0.85), (4000, 0.7), (4000, 0.4)]


def test_soft_movement_pruning_pays_less_for_scores():
    rungs = [rung("{prune: {method: movement, penalty: 40}, distill: {tokens: 1000}}")]
    longer = rung("{prune: {method: movement, penalty: 40}, distill: {tokens: 4000}}")
    history = [failed(rungs[0], "accuracy"), failed(longer, "accuracy")]
    assert next_recipe(rungs, history)[0].recipe.prune.penalty == 10
