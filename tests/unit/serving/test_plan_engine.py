"""Engines planned for four models on five GPUs, against hand computation."""

from pathlib import Path

import pytest

from trimtab.base.errors import InputError
from trimtab.model.hardware import GB, target
from trimtab.model.memory import kv_bytes_per_token
from trimtab.model.outline import outline
from trimtab.planning.checks import refusal
from trimtab.planning.engine import plan_engine
from trimtab.planning.parallelism import worlds
from trimtab.recipe import Recipe
from trimtab.recipe.workload import Lengths, Workload

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = {name: outline(CONFIGS / f"{name}.json") for name in
          ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen3-32b")}  # fmt: skip
#: 64 requests hold 64 * (2048 + 512) = 163,840 tokens; a step has 64 + 2048, rounded up to 3,072 tokens.
WORKLOAD = Workload(
    input=Lengths(mean=1024, p95=2048, max=4096), output=Lengths(mean=256, p95=512, max=1024), concurrency=64
)
BF16 = Recipe.parse("engine: {backend: trtllm}")
FP8 = Recipe.parse("{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: trtllm}}")


def test_parameters_of_the_configs():
    # from the models' cards
    assert {name: facts.parameters for name, facts in MODELS.items()} == {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "qwen3-32b": 32_762_123_264,
    }
    assert MODELS["qwen3-32b"].heads * MODELS["qwen3-32b"].head_dim != MODELS["qwen3-32b"].hidden_size


# GB on each device, world = tp * pp: linears / world + the rest (embeddings, head, norms), KV cache / world, both in
# 16 bits, and at most 0.6 of activations (3072 tokens * (4 * hidden + 3 * intermediate / tp) * 2 bytes, and logits).
# It fits when the KV cache is at most 0.9 of what is free.
#
# model | linears, rest   | KV bytes a token                 | KV of 163,840 tokens
# 8B    |  13.96,  2.10   | 2 * 32 * 8 * 128 * 2 = 131,072   | 21.47
# 70B   | 136.90,  4.21   | 2 * 80 * 8 * 128 * 2 = 327,680   | 53.69
# 405B  | 803.29,  8.41   | 2 * 126 * 8 * 128 * 2 = 516,096  | 84.56
# 32B   |  62.41,  3.11   | 2 * 64 * 8 * 128 * 2 = 262,144   | 42.95
CASES = [
    # 16.1 of weights leave 31.5 of 48, and 0.9 of that hold 21.5
    ("llama-3.1-8b", BF16, "l40s", 1, 1),
    ("llama-3.1-8b", BF16, "a100-80", 1, 1),
    ("llama-3.1-8b", BF16, "h100", 1, 1),
    ("llama-3.1-8b", BF16, "h200", 1, 1),
    ("llama-3.1-8b", BF16, "b200", 1, 1),
    # four: 34.2 + 4.2 = 38.4 of 48 leave 9.2, less than 13.4; eight: 17.1 + 4.2 = 21.3 leave 26.4 for 6.7
    ("llama-3.1-70b", BF16, "l40s", 8, 1),
    # two: 68.4 + 4.2 = 72.7 of 80 leave 6.9, less than 26.8; four: 38.4 leave 41.2 for 13.4
    ("llama-3.1-70b", BF16, "a100-80", 4, 1),
    ("llama-3.1-70b", BF16, "h100", 4, 1),
    # one: 141.1 of 141; two: 72.7 leave 67.9 for 26.8
    ("llama-3.1-70b", BF16, "h200", 2, 1),
    # one: 141.1 of 180 leave 38.2, less than 53.7; two as above
    ("llama-3.1-70b", BF16, "b200", 2, 1),
    # 16: 50.2 + 8.4 of 48; 24: 33.47 + 8.41 + 0.56 leave 5.56, of which 2 stay free: 0.64 of it, 3.56, hold 3.52
    ("llama-3.1-405b", BF16, "l40s", 8, 3),
    # eight: 100.4 + 8.4 of 80; 16: 50.2 + 8.4 = 58.6 leave 20.8 for 5.3
    ("llama-3.1-405b", BF16, "a100-80", 8, 2),
    ("llama-3.1-405b", BF16, "h100", 8, 2),
    # four: 200.8; eight: 100.4 + 8.4 = 108.8 of 141 leave 31.6 for 10.6
    ("llama-3.1-405b", BF16, "h200", 8, 1),
    ("llama-3.1-405b", BF16, "b200", 8, 1),
    # two: 31.2 + 3.1 = 34.3 of 48 leave 13.3, less than 21.5; four: 15.6 + 3.1 = 18.7 leave 29.0 for 10.7
    ("qwen3-32b", BF16, "l40s", 4, 1),
    # one: 65.5 of 80 leave 13.9, less than 42.9; two: 34.3 leave 45.3 for 21.5
    ("qwen3-32b", BF16, "a100-80", 2, 1),
    ("qwen3-32b", BF16, "h100", 2, 1),
    # 65.5 of 141 leave 74.9, and 0.9 of that hold 42.9
    ("qwen3-32b", BF16, "h200", 1, 1),
    ("qwen3-32b", BF16, "b200", 1, 1),
    # FP8 halves linears and KV cache. 8B: 7.0 + 2.1 of 48, 10.7 of KV. 70B: one has 68.5 + 4.2 = 72.7 of 80 and
    # leaves 6.8, less than 26.8; two 34.2 + 4.2 = 38.4 leave 41.0 for 13.4. 405B: eight have 50.2 + 8.4 = 58.6 of 80.
    # 32B: one has 31.2 + 3.1 = 34.3 of 80 and leaves 45.1 for 21.5.
    ("llama-3.1-8b", FP8, "l40s", 1, 1),
    ("llama-3.1-70b", FP8, "h100", 2, 1),
    ("llama-3.1-405b", FP8, "h100", 8, 1),
    ("qwen3-32b", FP8, "h100", 1, 1),
]


@pytest.mark.parametrize(("model", "recipe", "gpu", "tensor", "pipeline"), CASES)
def test_the_smallest_world(model, recipe, gpu, tensor, pipeline):
    found = plan_engine(MODELS[model], recipe, target(gpu), WORKLOAD, gpus=64)
    engine = found.recipe.engine
    assert (engine.tensor_parallel_size, engine.pipeline_parallel_size) == (tensor, pipeline)
    assert found.memory.fits and refusal(found.recipe, target(gpu), MODELS[model]) is None
    assert engine.max_batch_size == 64 and engine.max_seq_len == 4096 + 1024 and engine.max_num_tokens == 3072
    assert engine.enable_chunked_prefill and engine.kv_cache_tokens == 163_840
    need = 163_840 * kv_bytes_per_token(MODELS[model], found.recipe)
    free = found.memory.available - found.memory.weights - found.memory.activations
    assert need == found.memory.kv_cache <= engine.kv_cache_fraction * free <= free - 2 * GB


def test_every_smaller_world_is_refused_with_its_reason():
    lines = plan_engine(MODELS["llama-3.1-70b"], BF16, target("h100"), WORKLOAD).lines
    refused = [line.why for line in lines if line.why.startswith("not ")]
    # weights 68.451 + 4.207, KV cache 53.687 / 2, activations 3072 * (4 * 8192 + 3 * 14336) * 2 / 1e9 + 0.033 = 0.498
    assert [why.partition(":")[0] for why in refused] == ["not 1 x 1", "not 2 x 1", "not 1 x 2"]
    assert refused[1].endswith("72.66 GB weights + 26.84 GB KV cache + 0.50 GB activations = 100.00 GB of 80.00 GB: "
                               "does not fit")  # fmt: skip
    assert lines[0].value == "4 x 1" and "64 attention heads, 8 KV heads, 80 blocks" in lines[0].why


def test_requests_wait_where_they_do_not_fit():
    # 8B on an RTX 4090: 16.1 + 0.4 of 24 leave 7.5, of which 2 stay free: 5.5 GB hold 41,900 tokens, 16 * 2560 = 40,960
    found = plan_engine(MODELS["llama-3.1-8b"], BF16, target("rtx4090"), WORKLOAD, gpus=1)
    assert found.recipe.engine.max_batch_size == 16
    assert any(line.why == "64 requests at a time, of which 48 wait for room" for line in found.lines)


def test_short_prompts_are_read_whole_and_the_torch_engine_reads_all_so():
    short = Workload(input={"mean": 100, "p95": 200, "max": 900}, output={"mean": 9, "p95": 9, "max": 9}, concurrency=4)
    engine = plan_engine(MODELS["llama-3.1-8b"], BF16, target("h100"), short).recipe.engine
    assert engine.max_num_tokens == 2048 and not engine.enable_chunked_prefill and engine.max_seq_len == 909
    engine = plan_engine(MODELS["llama-3.1-8b"], Recipe(), target("h100"), WORKLOAD).recipe.engine
    assert engine.max_num_tokens == 4096 and not engine.enable_chunked_prefill and engine.world_size == 1


def test_a_workload_may_be_a_histogram():
    # 94 of 100 are 100 long, so the 95th percentile is 1,000; mean (9,400 + 5,000 + 10,000) / 100
    lengths = Lengths(histogram={100: 94, 1000: 5, 10_000: 1})
    assert (lengths.mean, lengths.p95, lengths.max) == (244, 1000, 10_000)
    assert Lengths(histogram={7: 1}).p95 == 7
    recipe = Recipe.parse("workload: {input: {histogram: {7: 1, 9: 2}}}")  # which is read back in each task of a run
    assert Recipe.parse(recipe.to_json()) == Recipe.parse(recipe.to_yaml()) == recipe


def test_worlds():
    assert list(worlds(4)) == [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
    assert list(worlds(24))[-8:] == [(8, 2), (4, 4), (2, 8), (1, 16), (8, 3), (4, 6), (2, 12), (1, 24)]
    assert list(worlds(3)) == [(1, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ("input: {mean: 5, p95: 5}", "input: {'mean': 5, 'p95': 5} lacks mean, p95 or max; write {mean: 500"),
        ("input: {mean: 5, p95: 9, max: 8}", "has a mean or p95 above its max; write max as the longest"),
        ("input: {max: 5, histogram: {5: 1}}", "has a histogram, and mean, p95 or max beside it; write either"),
        ("concurency: 4", "unknown key 'concurency'; write 'concurrency'"),
    ],
)
def test_bad_workloads(workload, message):
    with pytest.raises(InputError) as error:
        Workload.parse(workload)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "gpu", "recipe", "longest", "message"),
    [
        ("qwen3-32b", "h100", BF16, 65_536,
         "workload: input.max 65,536 and output.max 1,024 make 66,560 tokens, and the model reads 40,960"),
        ("llama-3.1-405b", "h100", BF16, 4096,
         "not one request fits on 8 h100; on 1 x 8: engine.pipeline_parallel_size: 8 does not divide 126 blocks"),
        ("llama-3.1-8b", "a100-80", FP8, 4096,
         "not one request fits on 8 a100-80; on 1 x 8: quantize.format: fp8 needs compute capability 8.9"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(model, gpu, recipe, longest, message):
    workload = WORKLOAD.model_copy(update={"input": Lengths(mean=1024, p95=2048, max=longest)})
    with pytest.raises(InputError) as error:
        plan_engine(MODELS[model], recipe, target(gpu), workload)
    assert message in str(error.value)


def test_an_outline_names_what_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="lacks 'hidden_size'; give the model's own config.json"):
        outline(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(InputError, match="num_hidden_layers must be a whole number above 0, got None"):
        outline(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}'
    )
    with pytest.raises(InputError, match="lacks 'intermediate_size'; give the model's own config.json"):
        outline(tmp_path / "config.json")
