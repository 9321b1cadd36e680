"""The ladders of the decision matrix."""

import pytest
from facts import LLAMA_3B, LLAMA_8B, LLAMA_70B, MODELS, SMOLLM2, llama, on

from trimtab.base.errors import InputError
from trimtab.catalog.goals import GOALS
from trimtab.model.hardware import GB, target
from trimtab.model.memory import memory
from trimtab.model.shapes import pruned
from trimtab.planning.checks import refusal
from trimtab.planning.matrix import MAX_RUNGS, ladder
from trimtab.recipe import Acceptance, Recipe, SparsePruning
from trimtab.recipe.workload import Workload

TARGETS = ("cpu", "a100-40", "a100-80", "l4", "l40s", "h100", "h200", "b200", "rtx4090")


def titles(goal, facts, name, **options):
    return [rung.recipe.title for rung in ladder(goal, facts, on(name), **options)]


# As many parameters as 7 and 3 of 30 blocks, 8 and 4 of 32: of SmolLM2's 79.6 million in the FFN 24.8 and 10.6, of
# Llama's 5.64 billion 1.74 and 0.87.
STUDENTS_CPU = ["-31 % FFN + distill 65,536 tokens + ", "-13 % FFN + distill 65,536 tokens + "]


def students(rest: str = "", *shares: str) -> list[str]:
    return [f"-{share} % FFN + distill 100,000,000 tokens{rest and ' + ' + rest}" for share in shares or (31, 15)]


#: Served by TensorRT-LLM on Hopper and Blackwell; where they are, students, as small and trained, have no place.
TRAINED, TRAINED_NVFP4 = (f"distill 10,000,000 tokens, rounded + {form}" for form in ("int4_rtn", "nvfp4"))
MIXES = ["mixed_gpu 5 bits", "mixed_gpu 6 bits", "mixed_gpu 7 bits"]
LADDERS = [
    ("fit_larger_model", SMOLLM2, "cpu", [
        "int4_rtn", "int4_gptq", "mixed 5 bits", "mixed 6 bits", "mixed 7 bits", "int8_wo",
    ]),
    # one GPU of 80 GB cannot train 6 or 8 billion parameters, of 20 bytes each, beside their teacher; two or four can
    ("fit_larger_model", LLAMA_8B, "h100", ["int4_awq", "int4_gptq", "nvfp4_wo", TRAINED, *MIXES, "fp8", "fp8_gptq"]),
    # NVFP4 where it is served: by TensorRT-LLM on Blackwell, its weights alone on Hopper too, and nowhere by torch
    ("fit_larger_model", LLAMA_8B, "b200", [
        "nvfp4", "int4_awq", "int4_gptq", "nvfp4_wo", TRAINED_NVFP4, TRAINED, *MIXES, "fp8", "fp8_gptq",
    ]),
    ("fit_larger_model", LLAMA_8B, "a100-80", [
        "int4_awq", "int4_gptq", TRAINED, "int4_awq, down_proj in 16 bits", *students(),
    ]),
    ("fit_larger_model", LLAMA_3B, "h100", ["int4_awq", "int4_gptq", "nvfp4_wo", TRAINED, *MIXES, "fp8", "fp8_gptq"]),
    ("fit_larger_model", LLAMA_3B, "a100-80", [
        "int4_awq", "int4_gptq", TRAINED, "int4_awq, down_proj in 16 bits", *students("", "33", "14"),
    ]),
    ("lower_latency", SMOLLM2, "cpu", [
        "int8_wo", "int8_sq", "int4_awq", "int4_gptq", "mixed 5 bits",
        *(title + "int8_wo" for title in STUDENTS_CPU), "int8_wo, down_proj in 16 bits",
    ]),
    ("lower_latency", LLAMA_8B, "h100", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", "int4_awq", "int4_gptq", "nvfp4_wo", TRAINED, MIXES[0],
        *students("fp8 + fp8 KV"), "fp8_gptq, down_proj in 16 bits",
    ]),
    ("lower_latency", LLAMA_8B, "a100-80", [
        "int4_awq", "int4_gptq", TRAINED, *students("bf16 + fp8 KV"), "int4_awq, down_proj in 16 bits",
    ]),
    ("lower_latency", LLAMA_3B, "a100-80", [
        "int4_awq", "int4_gptq", TRAINED, *students("bf16 + fp8 KV", "33", "14"), "int4_awq, down_proj in 16 bits",
    ]),
    ("lower_latency", LLAMA_8B, "b200", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", "nvfp4 + fp8 KV", "nvfp4", "int4_awq", "int4_gptq", "nvfp4_wo",
        TRAINED_NVFP4, TRAINED, MIXES[0], students("fp8 + fp8 KV")[0],
    ]),
    # a GPU that can train the model trains INT4 with its rounding too
    ("lower_latency", SMOLLM2, "h100", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", "int4_awq", "int4_gptq", "nvfp4_wo", TRAINED,
        MIXES[0], *(f"-{share} % FFN + distill 100,000,000 tokens + fp8 + fp8 KV" for share in (31, 13)),
        "fp8_gptq, down_proj in 16 bits",
    ]),
    ("fit_larger_model", SMOLLM2, "h100", [
        "int4_awq", "int4_gptq", "nvfp4_wo", TRAINED, *MIXES, "fp8", "fp8_gptq",
    ]),
    ("higher_throughput", SMOLLM2, "cpu", [
        "int8_sq", "int8_wo", *(title + "int8_sq" for title in STUDENTS_CPU), "int8_wo, down_proj in 16 bits",
    ]),
    ("higher_throughput", LLAMA_8B, "h100", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", *students("fp8 + fp8 KV"), "fp8_gptq, down_proj in 16 bits",
    ]),
    ("higher_throughput", LLAMA_8B, "b200", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", "nvfp4 + fp8 KV", "nvfp4", TRAINED_NVFP4,
        "mixed_fp4 6 bits, 0.4 of the time + fp8 KV",
        *students("fp8 + fp8 KV"), "fp8_gptq, down_proj in 16 bits",
    ]),
    ("higher_throughput", LLAMA_8B, "a100-80", ["bf16 + fp8 KV", *students("bf16 + fp8 KV")]),
    ("higher_throughput", LLAMA_3B, "a100-80", ["bf16 + fp8 KV", *students("bf16 + fp8 KV", "33", "14")]),
    ("long_context", SMOLLM2, "cpu", ["int8_wo", "int8_sq", "int4_awq"]),
    ("long_context", LLAMA_8B, "h100", ["fp8 + fp8 KV", "fp8", "fp8_gptq", "int4_awq + fp8 KV", "bf16 + fp8 KV"]),
    ("long_context", LLAMA_8B, "a100-80", ["int4_awq + fp8 KV", "bf16 + fp8 KV"]),
    # where eight bits leave too little for the whole context, INT4 stands first
    ("long_context", LLAMA_70B, "h100", ["int4_awq + fp8 KV", "fp8 + fp8 KV", "fp8", "fp8_gptq", "bf16 + fp8 KV"]),
    ("lower_cost", LLAMA_8B, "h100", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", *students("fp8 + fp8 KV"), "fp8_gptq, down_proj in 16 bits",
    ]),
    ("lower_cost", LLAMA_8B, "b200", [
        "fp8 + fp8 KV", "fp8", "fp8_gptq", "nvfp4 + fp8 KV", "nvfp4", TRAINED_NVFP4,
        "mixed_fp4 6 bits, 0.4 of the time + fp8 KV",
        *students("fp8 + fp8 KV"), "fp8_gptq, down_proj in 16 bits",
    ]),
    ("lower_cost", LLAMA_8B, "a100-80", [
        "int4_awq", *students("bf16 + fp8 KV"), "int4_awq, down_proj in 16 bits",
    ]),
    ("lower_cost", LLAMA_3B, "a100-80", [
        "int4_awq", *students("bf16 + fp8 KV", "33", "14"), "int4_awq, down_proj in 16 bits",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("goal", "facts", "name", "expected"), LADDERS)
def test_ladder(goal, facts, name, expected):
    assert titles(goal, facts, name) == expected


@pytest.mark.parametrize(("name", "trained"), [("l4", True), ("h100", True), ("cpu", False)])
def test_int4_is_trained_where_a_gpu_can_train_the_model(name, trained):
    titles_ = titles("fit_larger_model", SMOLLM2, name, backend="torch")
    assert (TRAINED in titles_) is trained
    # 18 bytes of each with its teacher, of eight processes 90 GB each
    large = SMOLLM2.model_copy(update={"parameters": 40_000_000_000})
    found = [rung.recipe for rung in ladder("lower_latency", large, on("h100")) if rung.recipe.distill]
    assert not any(recipe.distill.quantization_aware for recipe in found)


def test_students_of_what_cannot_be_narrowed_have_fewer_blocks():
    granite = SMOLLM2.model_copy(update={"model_type": "granite"})
    found = [rung for rung in ladder("lower_latency", granite, on("cpu")) if rung.recipe.prune]
    assert [rung.recipe.prune.blocks for rung in found] == [7, 3]
    assert all(rung.why.startswith("fewer blocks, taught by") for rung in found)
    narrow = [rung for rung in ladder("lower_latency", SMOLLM2, on("cpu")) if rung.recipe.prune]
    assert all(rung.why.startswith("a narrower FFN") for rung in narrow)
    for less, fewer in zip(narrow, found, strict=True):  # of as many parameters, to a multiple of 64 neurons
        left = [pruned(facts, rung.recipe.prune).parameters for facts, rung in ((SMOLLM2, less), (granite, fewer))]
        assert left[0] == pytest.approx(left[1], rel=0.015)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_rung_runs_fits_differs_and_says_why(goal, name, model):
    facts, hardware = MODELS[model], on(name)
    for backend in hardware.backends:
        try:
            rungs = ladder(goal, facts, hardware, backend=backend)
        except InputError as error:
            assert f"target: {name} runs no recipe for {goal}" in str(error)
            continue
        assert 1 <= len(rungs) <= MAX_RUNGS
        assert len({rung.recipe.digest for rung in rungs}) == len(rungs)
        for rung in rungs:
            recipe = rung.recipe
            assert recipe.engine.backend == backend
            assert refusal(recipe, hardware, facts) is None
            assert not hardware.is_emulated(recipe) and not hardware.is_kv_cache_emulated(recipe)
            assert memory(facts, recipe, hardware).fits
            assert not isinstance(recipe.prune, SparsePruning)
            assert recipe.engine.max_num_tokens >= recipe.engine.max_batch_size
            assert recipe.engine.enable_chunked_prefill or (
                recipe.engine.max_num_tokens >= recipe.engine.max_seq_len
            )
            assert len(rung.why) > 20
            assert Recipe.parse(recipe.to_json()) == recipe


def test_the_largest_group_size_that_divides_is_used():
    sizes = {rung.recipe.quantize.group_size for rung in ladder("fit_larger_model", SMOLLM2, on("cpu"))[:8]}
    assert sizes == {64}  # 576 = 9 * 64
    assert ladder("fit_larger_model", LLAMA_8B, on("cpu"))[0].recipe.quantize.group_size == 128


def test_no_int4_where_rows_are_odd():
    odd = llama(2, 576, 1537, 9, 3, 64, 256, 512, True)
    odd = odd.model_copy(update={"linears": tuple(x for x in odd.linears if "down" not in x.name)})
    assert titles("fit_larger_model", odd, "cpu") == ["int8_wo"]


def test_no_int4_where_no_group_size_divides():
    odd = llama(2, 72, 200, 3, 3, 24, 256, 512, True)
    assert titles("fit_larger_model", odd, "cpu") == ["int8_wo"]


@pytest.mark.parametrize(
    ("goal", "batch", "length", "tokens", "chunked"),
    [
        ("lower_latency", 8, 4096, 8192, False),
        ("higher_throughput", 128, 4096, 16384, True),  # 256 would need 68.7 GB of KV beside 9.1 GB
        ("fit_larger_model", 8, 2048, 8192, False),
        ("long_context", 4, 131072, 8192, True),
        ("lower_cost", 128, 4096, 8192, True),
    ],
)
def test_engine_limits_follow_the_goal(goal, batch, length, tokens, chunked):
    engine = ladder(goal, LLAMA_8B, on("h100"))[0].recipe.engine
    assert (engine.max_batch_size, engine.max_seq_len) == (batch, length)
    assert (engine.max_num_tokens, engine.enable_chunked_prefill) == (tokens, chunked)


def test_int4_is_served_at_batch_1_for_latency():
    awq, gptq = ladder("lower_latency", LLAMA_8B, on("h100"))[3:5]
    assert [awq.recipe.title, gptq.recipe.title] == ["int4_awq", "int4_gptq"] and "0.75x" in awq.why
    assert awq.recipe.engine.max_batch_size == gptq.recipe.engine.max_batch_size == 1


def test_memory_decides_what_stands_on_the_ladder():
    # 8B in INT8 needs 9.1 GB: not on a machine of 8 GB; INT4 needs 5.7 GB.
    found = [r.recipe.title for r in ladder("fit_larger_model", LLAMA_8B, target("cpu", 8 * GB))]
    assert found[0] == "int4_rtn" and "int8_wo" not in found


def test_more_devices_only_when_one_is_not_enough():
    rungs = {r.recipe.title: r for r in ladder("lower_latency", LLAMA_70B, on("h100"))}
    assert rungs["fp8 + fp8 KV"].recipe.engine.tensor_parallel_size == 1  # 72.7 GB of weights
    spared = rungs["fp8_gptq, down_proj in 16 bits"]
    assert spared.recipe.engine.tensor_parallel_size == 2 and spared.why.endswith("needs 2 h100")


def test_saved_devices_serve_replicas():
    # 141 GB in BF16 with sixteen sequences of KV cache: four of 80 GB; in FP8 two
    why = ladder("higher_throughput", LLAMA_70B, on("h100"))[0].why
    assert "the unchanged model needs 4 devices, so the devices saved serve replicas" in why


def test_a_smaller_gpu_that_is_enough_is_named():
    assert ladder("lower_cost", LLAMA_8B, on("h100"))[0].why.endswith("a smaller GPU is enough: l4, 24 GB")


def test_acceptance_is_that_of_the_run():
    accept = Acceptance(min_recovery=0.9)
    rungs = ladder("lower_cost", SMOLLM2, on("cpu"), accept=accept)
    assert rungs and all(rung.recipe.accept == accept for rung in rungs)


def test_the_users_recipe_stands_first_and_once():
    second = ladder("fit_larger_model", SMOLLM2, on("cpu"))[1].recipe
    first = second.model_copy(update={"name": "mine", "accept": Acceptance(min_recovery=0.5)})
    found = ladder("fit_larger_model", SMOLLM2, on("cpu"), first=first)
    assert found[0].recipe == first and found[0].why == "the recipe that the user gave"
    assert [r.recipe.title for r in found][:3] == ["mine", "int4_rtn", "mixed 5 bits"] and len(found) == 6


def test_the_users_recipe_may_be_judged_by_emulation():
    first = Recipe.parse("quantize: {format: fp8}")
    why = ladder("fit_larger_model", SMOLLM2, on("cpu"), first=first)[0].why
    assert why.endswith("judged by emulation, because cpu does not compute in fp8")


def test_the_users_kv_cache_may_be_judged_by_emulation():
    first = Recipe.parse("quantize: {format: int8_wo, kv_cache: nvfp4}")
    rungs = ladder("fit_larger_model", SMOLLM2, on("h100"), first=first)
    assert rungs[0].why == (
        "the recipe that the user gave; its KV cache in nvfp4 is judged by emulation and takes 16 bits here"
    )
    assert not any(rung.recipe.quantize and rung.recipe.quantize.kv_cache != "none" for rung in rungs[1:])


@pytest.mark.parametrize(
    ("goal", "name", "options", "sentence"),
    [
        ("faster", "cpu", {}, "goal: 'faster' is not known; .*lower_latency"),
        ("lower_latancy", "cpu", {}, "write 'lower_latency'"),
        ("lower_cost", "cpu", {"backend": "trtllm"}, "'trtllm' does not run on cpu; valid: torch"),
        ("lower_cost", "h100", {"backend": "tensorrt"}, "'tensorrt' is not known; valid: torch"),
        (
            "lower_cost",
            "a100-80",
            {"first": Recipe.parse("{quantize: {format: fp8}, engine: {backend: trtllm}}")},
            "fp8 needs compute capability 8.9 or later .* and a100-80 has 8.0",
        ),
        (
            "long_context",
            "l4",
            {"first": Recipe.parse("engine: {backend: trtllm, max_seq_len: 131072}")},
            "does not fit; write a smaller max_batch_size",
        ),
    ],
)
def test_bad_input(goal, name, options, sentence):
    with pytest.raises(InputError, match=sentence):
        ladder(goal, LLAMA_8B, on(name), **options)


def test_a_model_that_fits_nowhere_says_what_it_needs():
    with pytest.raises(InputError, match=r"target: cpu runs no recipe for lower_cost .* GB: does not fit"):
        ladder("lower_cost", LLAMA_70B, target("cpu", 8 * GB))


def test_a_workload_in_the_place_of_a_goal_s_sizes():
    """More devices where one does not hold it; a context for what is measured, however short the requests are."""
    chats = Workload(input={"mean": 300, "p95": 900, "max": 3000}, output={"mean": 90, "p95": 300, "max": 1000})
    for goal in GOALS:
        for rung in ladder(goal, LLAMA_8B, target("l4"), workload=chats.of_batch(64)):
            engine = rung.recipe.engine
            assert (engine.max_batch_size, engine.max_seq_len, engine.kv_cache_tokens) == (64, 4000, 64 * 1200)
            assert "for 64 requests at a time, of at most 4,000 tokens" in rung.why
    short = Workload(input={"mean": 9, "p95": 9, "max": 9}, output={"mean": 9, "p95": 9, "max": 9}, concurrency=2)
    own = Recipe.parse("{quantize: {format: fp8}, engine: {backend: trtllm}}")
    rungs = ladder("lower_latency", LLAMA_8B, target("h100"), first=own, workload=short)
    assert {(rung.recipe.engine.max_batch_size, rung.recipe.engine.max_seq_len) for rung in rungs} == {(2, 2048)}
    assert rungs[0].why == "the recipe that the user gave; for 2 requests at a time, of at most 18 tokens"
