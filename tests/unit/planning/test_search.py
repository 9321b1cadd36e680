"""Recipe and serving plan together, for a workload, by measured speeds."""

from __future__ import annotations

import pytest
from facts import LLAMA_8B

from trimtab.catalog.decode_speeds import TABLES
from trimtab.model.hardware import target
from trimtab.planning.matrix import ladder
from trimtab.recipe import Recipe
from trimtab.recipe.workload import Workload


def planned(concurrency: int, goal: str = "lower_latency", backend: str = "torch", machine: str = "h200", **more):
    """The rungs for a workload: what each stores, at which batch, with which KV cache, and why."""
    facts, workload = more.pop("facts", LLAMA_8B), Workload().of_batch(concurrency)
    return ladder(goal, facts, target(machine), backend=backend, workload=workload, **more)


def formats(rungs):
    return [rung.recipe.quantize.format for rung in rungs if "as measured of" in rung.why]


@pytest.mark.parametrize(
    ("batch", "times"),
    [(1, 351 / 240), (64, 16418 / 11671), (65, None), (0, None), (24, (2496 / 1679 + 16418 / 11671) / 2)],
)
def test_between_batches_and_beyond(batch, times):
    # 24 is about halfway from 8 to 64 by its logarithm: 22.6
    found = TABLES["h200", "torch"].times("fp8", batch)
    assert found == (times and pytest.approx(times, rel=0.01))
    assert TABLES["h200", "vllm"].times("int8_wo", 8) is None, "nobody measured it"


def test_the_recipe_is_chosen_with_the_batch():
    """Four bits are the fastest for few requests, eight for many."""
    assert formats(planned(1))[:2] == ["int4_awq", "fp8"]
    # of one run each, FP8 and INT8 are within a twentieth of each other and keep their order
    assert formats(planned(48))[0] == "fp8" and formats(planned(48))[-1] == "int4_awq"
    assert "1.42 times the unchanged tokens/s at batch 48, as measured of an 8B model on one h200" in planned(48)[0].why
    assert formats(planned(1, backend="vllm"))[-1] == "int4_awq", "vLLM is slower in four bits than in eight"


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": "h100", "backend": "vllm"},
        {"backend": "trtllm"},
        {"concurrency": 200},
        {"facts": LLAMA_8B.model_copy(update={"parameters": 10**9})},
        {"facts": LLAMA_8B.model_copy(update={"parameters": 70 * 10**9})},
        {"goal": "fit_larger_model"},
    ],
    ids=["another GPU", "another engine", "a larger batch", "a smaller model", "a larger one", "another goal"],
)
def test_no_table_speaks_for_what_was_not_measured(changed):
    rungs = planned(**{"concurrency": 48, **changed})
    assert rungs and not formats(rungs)


def test_the_users_own_recipe_stays_first():
    own = Recipe.parse("{quantize: {format: int8_sq, kv_cache: fp8}, engine: {backend: torch}}")
    rungs = planned(1, first=own)
    assert rungs[0].recipe.quantize == own.quantize and formats(rungs[1:])[0] == "int4_awq"


def test_without_a_workload_the_goal_s_row_decides():
    rungs = ladder("lower_latency", LLAMA_8B, target("h200"), backend="torch")
    assert rungs[0].recipe.quantize.format == "fp8" and not formats(rungs)
