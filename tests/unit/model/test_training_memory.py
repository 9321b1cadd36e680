"""The memory of a training, and the trainings that a plan makes of it."""

from __future__ import annotations

import pytest
from facts import LLAMA_1B, LLAMA_3B, LLAMA_8B, LLAMA_70B, SMOLLM2

from trimtab.base.errors import InputError
from trimtab.catalog.goals import GOALS
from trimtab.model.hardware import GB, GPUS, target
from trimtab.model.memory import TRAINING_SHARE, activation_bytes, trainable, training
from trimtab.planning import placement
from trimtab.planning.matrix import ladder
from trimtab.recipe import Recipe

DISTILL = "distill: {{tokens: 100000000, batch_size: 16, length: {length}{more}}}, engine: {{backend: trtllm}}"


def recipe(more: str = "", prune: str = "", length: int = 2048) -> Recipe:
    return Recipe.parse("{" + prune + DISTILL.format(more=f", {more}" if more else "", length=length) + "}")


@pytest.mark.parametrize(
    ("facts", "in_16_bits", "in_32_bits"),
    # Counted with torch.autograd.graph.saved_tensors_hooks around transformers' Llama with blocks of these sizes, the
    # difference that a block makes (transformers 5.14, torch 2.13, scaled_dot_product_attention).
    [(LLAMA_1B, 108_680, 200_840), (LLAMA_3B, 131_176, 237_672), (LLAMA_8B, 200_840, None)],
    ids=["1B", "3B", "8B"],
)
def test_activations_are_those_that_were_counted(facts, in_16_bits, in_32_bits):
    assert activation_bytes(facts) == pytest.approx(in_16_bits, rel=0.03)
    if in_32_bits:
        assert activation_bytes(facts, width=4) == pytest.approx(in_32_bits, rel=0.03)


def test_a_training_by_hand():
    need = training(LLAMA_1B, recipe("gradient_accumulation: 4"), target("h100"))
    assert need.weights == 2 * 2 * LLAMA_1B.parameters, "student and teacher in 16 bits"
    # a gradient in 16 bits, and in float32 a master, its gradient and two moments
    assert need.states == 18 * LLAMA_1B.parameters
    # four windows of 2,048 tokens in sixteen blocks, and four vectors behind the last
    assert need.activations == 4 * 2048 * (16 * 108_680 + 4 * 2 * 2048)
    # four copies of 512 MiB of logits; the head's gradient in float32 and in 16 bits; and in the teacher, or of
    # held-out windows, at most 16,384 tokens in four hidden vectors and three of the FFN
    assert need.loss == 4 * 2**29 + 6 * 128_256 * 2048 + 16_384 * 2 * (4 * 2048 + 3 * 8192)
    assert need.fits and need.explanation.endswith("of 80 GB: fits")


@pytest.mark.parametrize(
    ("more", "prune", "change"),
    [
        ("stored_logits: 64", "", {"weights": -2 * LLAMA_1B.parameters}),
        # a block's input alone, and one block that is computed again
        ("activation_checkpointing: true", "", {"activations": 32_768 * (16 * 2 * 2048 + 108_680 - 16 * 108_680)}),
        ("hidden_weight: 1.0", "", {"activations": 32_768 * 2 * 16 * 2 * 2048}),
        # scores with their gradients and moments, and the weights that they leave
        ("", "prune: {method: movement, sparsity: 0.5}, ", {"states": 18 * LLAMA_1B.linear_parameters}),
    ],
)
def test_what_changes_a_training(more, prune, change):
    plain, other = training(LLAMA_1B, recipe(), target("h200")), training(LLAMA_1B, recipe(more, prune), target("h200"))
    told = plain.model_dump()
    assert other.model_dump() == {name: value + change.get(name, 0) for name, value in told.items()}


def test_a_training_that_four_gpus_share_by_hand():
    """An 8B, of whose states one GPU would hold 161 GB, and of both models and their gradients 32."""
    need = training(LLAMA_8B, recipe("gradient_accumulation: 4, processes: 4"), target("h100"))
    # a quarter of the student in float32, with its gradient and two moments, and of the teacher in 16 bits
    assert need.weights == (4 + 2) * LLAMA_8B.parameters / 4 and need.states == 12 * LLAMA_8B.parameters / 4
    # one window of 2,048 tokens in each process
    assert need.activations == 2048 * (32 * 200_840 + 4 * 2 * 4096)
    # whole are both heads in 16 bits, and in the end the head's gradient in float32 and the embedding's in 16 bits,
    # which are more than a block of 218 million three times in 16 bits, and its gradient in float32
    table, block = 128_256 * 4096, 218_103_808
    assert need.gathered == 2 * 2 * table + (4 + 2) * table and 6 * table > (3 * 2 + 4) * block
    assert need.fits and need.explanation.endswith("in each of 4 processes of 80 GB: fits")
    assert 61 < need.total / GB < 63


def test_what_is_gathered_of_weights_that_are_made_of_others():
    """Rounded copies of all linear layers wait for the backward pass, or with checkpointing those of one block; scores
    are whole in every process, with their gradients and moments, and what is kept of zeros is a byte of a part."""

    def needed(more, prune=""):
        more = f"processes: 4, {more}"
        return training(LLAMA_8B, recipe(more, prune), target("h200"))

    plain, linear, block = needed("seed: 0"), LLAMA_8B.linear_parameters, 218_103_808
    rounded = "quantize: {format: int4_rtn}, "
    assert needed("quantization_aware: true", rounded).gathered == plain.gathered + 2 * linear
    again = needed("quantization_aware: true, activation_checkpointing: true", rounded)
    assert again.gathered == plain.gathered + 2 * block
    learned = needed("seed: 0", "prune: {method: movement, sparsity: 0.5}, ")
    assert learned.states == plain.states + 16 * linear and learned.gathered == plain.gathered + 2 * linear
    kept = needed("seed: 0", "prune: {method: magnitude, sparsity: 0.5}, ")
    assert kept.states == plain.states + linear / 4 and kept.gathered == plain.gathered


@pytest.mark.parametrize(
    ("facts", "gpu", "most", "processes", "parts", "checkpointing"),
    [
        (LLAMA_1B, "h100", 8, 1, 2, False),  # one holds it: no second is asked for
        (LLAMA_3B, "h100", 8, 2, 2, False),
        (LLAMA_8B, "h100", 8, 4, 4, False),
        (LLAMA_8B, "h200", 8, 2, 4, False),
        (LLAMA_8B, "a100-40", 8, 8, 1, True),
        (LLAMA_8B, "h100", 2, None, None, None),
        (LLAMA_70B, "h200", 8, None, None, None),
    ],
)
def test_a_training_is_on_as_few_gpus_as_hold_it(facts, gpu, most, processes, parts, checkpointing):
    found = trainable(facts, recipe(), target(gpu), most)
    fields = ("processes", "gradient_accumulation", "activation_checkpointing")
    told = tuple(getattr(found.distill, name) for name in fields) if found else (None, None, None)
    assert told == (processes, parts, checkpointing)


def test_a_training_of_eight_billion_stands_on_the_ladder_of_a_target_of_several():
    rungs = [rung for rung in ladder("fit_larger_model", LLAMA_8B, target("h100")) if rung.recipe.distill]
    assert rungs and all("; trained on 4 h100" in rung.why for rung in rungs if rung.recipe.distill.processes == 4)
    assert max(rung.recipe.distill.processes for rung in rungs) == 4
    assert all(rung.recipe.distill.processes == 1 for rung in ladder("fit_larger_model", LLAMA_8B, target("h100"),
               backend="torch") if rung.recipe.distill), "which serves on one"  # fmt: skip


def test_on_ones_own_machine_a_training_gets_no_more_gpus_than_there_are():
    assert placement.most_devices(recipe(), target("h100")) == 8, "in a cluster"
    assert placement.most_devices(recipe(), target("h100").model_copy(update={"devices": 2})) == 2
    assert placement.most_devices(recipe(), target("cpu", 100 * GB)) == 1


def test_a_cpu_trains_in_float32_and_its_processes_share_its_memory():
    need = training(LLAMA_1B, recipe("processes: 2"), target("cpu", 100 * GB))
    assert (need.weights, need.states) == (8 * LLAMA_1B.parameters / 2, 12 * LLAMA_1B.parameters / 2)
    assert need.activations == 8 * 2048 * (16 * 200_840 + 4 * 4 * 2048) and need.available == 50 * GB


@pytest.mark.parametrize(
    ("facts", "gpu", "length", "parts", "checkpointing"),
    [
        (LLAMA_1B, "h200", 2048, 1, False),
        (LLAMA_1B, "h100", 2048, 2, False),
        (LLAMA_1B, "a100-40", 2048, 16, False),
        # one window of 8,192 tokens keeps 14 GB, beside 27 GB of both models and the optimizer
        (LLAMA_1B, "a100-40", 8192, 8, True),
        (LLAMA_3B, "h100", 2048, None, None),  # 3.2 billion parameters of 20 bytes, and their teacher
        (LLAMA_3B, "h200", 2048, 4, False),
        (SMOLLM2, "l4", 2048, 2, False),
    ],
)
def test_a_training_is_in_as_few_parts_as_fit(facts, gpu, length, parts, checkpointing):
    found = trainable(facts, recipe(length=length), target(gpu))
    told = (found.distill.gradient_accumulation, found.distill.activation_checkpointing) if found else (None, None)
    assert told == (parts, checkpointing)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("facts", [SMOLLM2, LLAMA_1B, LLAMA_3B, LLAMA_8B], ids=["135M", "1B", "3B", "8B"])
def test_every_training_on_a_ladder_fits(facts, gpu, goal):
    for rung in ladder(goal, facts, target(gpu)):
        if rung.recipe.distill:
            assert training(facts, rung.recipe, target(gpu)).total <= TRAINING_SHARE * target(gpu).memory_bytes


@pytest.mark.parametrize(
    ("facts", "gpu", "length", "sentence"),
    [
        (LLAMA_1B, "h100", 2048, "of 80 GB: does not fit; write gradient_accumulation: 2$"),
        (LLAMA_1B, "a100-40", 8192, "write gradient_accumulation: 8 and activation_checkpointing: true$"),
        (LLAMA_8B, "h100", 2048, "of 80 GB: does not fit; write processes: 4 and gradient_accumulation: 4$"),
        (LLAMA_8B, "l4", 2048, "even one window at a time; write a larger target, prune more, or leave distill out"),
    ],
)
def test_a_training_of_ones_own_that_does_not_fit_is_refused_with_one_that_does(facts, gpu, length, sentence):
    with pytest.raises(InputError, match=sentence):
        ladder("lower_latency", facts, target(gpu), first=recipe(length=length))


def test_checkpointing_is_written_down_only_where_it_is_asked_for():
    """Recipes from before it keep their digests, and the students that they trained are found."""
    assert "activation_checkpointing" not in recipe().model_dump(mode="json")["distill"]
    asked = recipe("activation_checkpointing: true")
    assert Recipe.parse(asked.to_json()) == asked and asked.digest != recipe().digest
