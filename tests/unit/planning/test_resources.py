"""What each stage needs before it runs: by hand, by the registry of stages, and against a machine."""

from __future__ import annotations

import pytest
from facts import LLAMA_8B, LLAMA_70B, SMOLLM2

from trimtab.catalog.goals import GOALS
from trimtab.model.hardware import GB, target
from trimtab.model.working_memory import PROCESS
from trimtab.planning import matrix, resources
from trimtab.planning.resources import Resources, needs
from trimtab.recipe import Engine, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages import STAGES, TASKS

EVERYTHING = """
calibrate: {samples: 512, length: 2048}
prune: {method: sparsegpt, pattern: "2:4"}
distill: {tokens: 1000000, generate: 100000, stored_logits: 64}
quantize: {format: mixed, effective_bits: 5.5}
"""
RECIPES = [
    "{}", EVERYTHING, "quantize: {format: int8_wo}", "quantize: {format: fp8, kv_cache: fp8}",
    "quantize: {format: int4_gptq}", "prune: {method: width, ffn: 0.3}", "prune: {method: magnitude, sparsity: 0.5}",
    "{prune: {method: movement, sparsity: 0.5}, distill: {tokens: 9}}",
    "quantize: {format: int4_rtn, exclude_sensitive: 2}",
]  # fmt: skip


@pytest.mark.parametrize("text", RECIPES)
def test_stages_are_those_of_the_registry(text):
    recipe = Recipe.parse(text)
    found = needs(SMOLLM2, recipe, target("cpu", 24 * GB))
    assert list(found) == [*(name for name, stage in STAGES.items() if stage.wanted(recipe)), "validate"]
    assert list(resources.ROWS) == list(STAGES) and {*TASKS, "validate"} <= {*found, *TASKS, "validate"}
    assert all(need.host_bytes > PROCESS["cpu"] and need.seconds > 0 and need.gpus == 0 for need in found.values())


@pytest.mark.parametrize(("sequential", "streams"), [("false", 1), ("true", 2), ("null", 2)])
def test_a_model_of_70_billion_goes_through_one_gpu_of_80_gigabytes(sequential, streams):
    """A block of it has 1.7 GB in 16 bits; its embeddings and head have 4.2 GB, a million tokens' hidden states 17."""
    quantize = f"{{format: int4_gptq, sequential: {sequential}}}"
    recipe = Recipe.parse(f"{{calibrate: {{samples: 512, length: 2048}}, quantize: {quantize}}}")
    found = needs(LLAMA_70B, recipe, target("h100"))
    for stage in ("calibrate", "recalibrate", "quantize"):
        assert 0 < found[stage].gpu_bytes < 80 * GB, stage
        assert found[stage].host_bytes < 50 * GB and found[stage].gpus == 1
    # Hidden states leave the GPU, of which they would take more than an eighth.
    assert found["calibrate"].host_bytes == pytest.approx(3.5 * GB + 3 * 2 * 856e6 + 2 * 512 * 2048 * 8192, rel=0.01)
    # The export's 41 GB, once more its blocks, which make room for its shards, and the streams of hidden states: the
    # dense model's, and the one of the model as quantized so far.
    hidden_states = 2 * 512 * 2048 * 8192
    assert found["quantize"].disk_bytes == pytest.approx(2 * 41 * GB + streams * hidden_states, rel=0.03)


def test_fp8_by_gptq_is_planned_with_what_gptq_holds():
    """The model runs, a block at a time, and four matrices of [in, in] at least stand beside it."""
    nearest, found = (
        needs(LLAMA_8B, Recipe.parse(f"quantize: {{format: {form}}}"), target("h200"))["quantize"]
        for form in ("fp8", "fp8_gptq")
    )
    assert found.gpu_bytes > 4 * 4 * 14_336**2 and found.seconds > nearest.seconds
    assert found.disk_bytes > nearest.disk_bytes


def test_calibration_by_hand():
    need = needs(LLAMA_8B, Recipe.parse("quantize: {format: fp8}"), target("h200"))["calibrate"]
    block, activations = 2 * 218_103_808, 8 * 512 * 200_840  # of eight windows: see test_training_memory
    between = 2 * 8 * 512 * 4096
    assert need.gpu_bytes == pytest.approx(0.7 * GB + 1.1 * (2 * block + activations + between), rel=0.01)
    assert need.host_bytes == pytest.approx(3.5 * GB + 3 * block, rel=0.01)


def test_what_trains_on_several_gpus_and_what_is_served_on_several():
    recipe = Recipe.parse(
        "{distill: {tokens: 99, processes: 4}, engine: {backend: trtllm, tensor_parallel_size: 8}}"
    )
    found = needs(LLAMA_70B, recipe, target("h200"), baseline=recipe)
    assert {name: need.gpus for name, need in found.items()} == {"distill": 4, "engine": 8, "validate": 8}


def test_judging_holds_both_models_where_they_have_room_and_else_the_larger():
    recipe, base = Recipe.parse("quantize: {format: int8_wo}"), Recipe()
    roomy, tight = (needs(LLAMA_8B, recipe, target("cpu", size), base)["validate"] for size in (200 * GB, 30 * GB))
    alone = needs(LLAMA_8B, base, target("cpu", 30 * GB))["validate"]
    assert roomy.host_bytes > alone.host_bytes + 8 * GB
    assert tight.host_bytes == alone.host_bytes


def test_a_model_that_is_scored_block_by_block():
    """Of 70 billion on a GPU of 80 GB: two blocks of 1.7 GB, or embeddings and head with 4.2, and what a step of 8,192
    tokens computes; beside them the hidden states of 960 items with four answers each."""
    machine, blocks = target("h100"), Recipe(engine=Engine(by_block=True))
    found = needs(LLAMA_70B, blocks, machine)
    running = 4 * 856e6 + 8192 * 2 * (4 * 8192 + 3 * 28672)
    between = 2 * 960 * 4 * 150 * 8192
    assert found["validate"].gpu_bytes == pytest.approx(0.7 * GB + 1.1 * (running + between), rel=0.01)
    assert found["validate"].host_bytes == pytest.approx(3.5 * GB + 6 * 856e6, rel=0.01)
    assert found["validate"].gpus == 1
    # A look and the confirmation each read 141 GB for items and for windows, at 1.5 GB a second.
    assert 4 * 141 / 1.5 < found["validate"].seconds < 30 * 60
    assert found["engine"].gpu_bytes == pytest.approx(0.7 * GB + 1.1 * 2 * 2.1e9, rel=0.01)
    # Its rows leave a GPU of which they would take more than an eighth.
    away = needs(LLAMA_70B, blocks, machine, evaluation=Evaluation(confirm_items=4000))["validate"]
    assert away.host_bytes == pytest.approx(3.5 * GB + 6 * 856e6 + 2 * 4000 * 4 * 150 * 8192, rel=0.01)
    # An attempt of more than half of the GPU is closed before; a smaller one stays.
    int4, two_bits = Recipe.parse("quantize: {format: int4_rtn}"), Recipe.parse("prune: {method: depth, blocks: 66}")
    alone, beside = (needs(LLAMA_70B, recipe, machine)["validate"].gpu_bytes for recipe in (int4, two_bits))
    assert needs(LLAMA_70B, int4, machine, blocks)["validate"].gpu_bytes == alone
    small = needs(LLAMA_70B, two_bits, machine, blocks)["validate"].gpu_bytes
    assert small == pytest.approx(beside + 1.1 * (running + between), rel=0.01)


@pytest.mark.parametrize("goal", GOALS)
def test_every_rung_has_its_needs(goal):
    machine = target("h100")
    rungs = matrix.ladder(goal, LLAMA_8B, machine)
    for rung in rungs:
        for need in needs(LLAMA_8B, rung.recipe, machine, Recipe()).values():
            assert 0 < need.gpu_bytes < 90 * GB and 0 < need.host_bytes < 100 * GB and 1 < need.seconds < 1e7


@pytest.mark.parametrize(
    ("need", "sentence"),
    [
        (Resources(host_bytes=23 * GB, disk_bytes=50 * GB), None),
        (Resources(host_bytes=141 * GB), "needs 141.0 GB of this machine's memory, and there are 24.0 GB"),
        (Resources(disk_bytes=280 * GB), "needs 280.0 GB of scratch disk, and there are 64.0 GB"),
    ],
)
def test_what_a_machine_lacks(need, sentence):
    assert resources.lacking(need, 24 * GB, 64 * GB) == sentence


def test_the_first_stage_that_this_machine_cannot_do(monkeypatch, tmp_path):
    found = {"calibrate": Resources(host_bytes=2 * GB), "distill": Resources(host_bytes=300 * GB)}
    monkeypatch.setattr(resources, "machine_memory", lambda: 24 * GB)
    lack = "needs 300.0 GB of this machine's memory, and there are 24.0 GB"
    assert resources.lacking_here(found, tmp_path / "not" / "yet") == ("distill", lack)
    assert resources.lacking_here({"calibrate": found["calibrate"]}, tmp_path) is None


def test_in_words_and_for_kubernetes():
    need = Resources(gpus=2, gpu_bytes=41 * GB, host_bytes=3_250_000_000, disk_bytes=0, seconds=95)
    assert resources.columns(need) == ("2 x 41 GB", "3.2 GB", "–", "1.6 min")
    assert resources.quantity(12 << 30) == "15Gi" and resources.quantity(1) == "1Gi"
