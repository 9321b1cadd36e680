"""The engine of the unchanged model: every run that makes sense begins with an attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.base.errors import InputError
from trimtab.catalog.goals import GOALS
from trimtab.judge import Verdict
from trimtab.loop import decisions
from trimtab.loop.state import Brief
from trimtab.model.hardware import GB, target
from trimtab.model.memory import memory
from trimtab.model.outline import outline
from trimtab.planning.checks import refusal
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import open_store

CONFIGS = Path(__file__).parents[1] / "configs"
#: Published shapes, by the models' config.json.
MODELS = {path.stem: outline(path) for path in sorted(CONFIGS.glob("*.json"))}
GPUS = ("l4", "a100-40", "a100-80", "h100", "h200", "b200", "rtx4090")
BASELINE = Verdict(outcome="baseline", reason="the model unchanged")
#: The least of each GPU whose memory holds so many billion weights of two bytes, and embeddings and head on each.
DEVICES = {
    "llama-3.1-8b": dict(zip(GPUS, (1, 1, 1, 1, 1, 1, 1), strict=True)),  # 16 GB
    "mistral-small-24b": dict(zip(GPUS, (4, 2, 1, 1, 1, 1, 4), strict=True)),  # 47 GB
    "qwen3-32b": dict(zip(GPUS, (4, 2, 1, 1, 1, 1, 4), strict=True)),  # 66 GB
    "llama-3.1-70b": dict(zip(GPUS, (8, 4, 2, 2, 2, 1, 8), strict=True)),  # 141 GB
}


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """A function: begins a run on a model of which the store knows the shapes alone."""
    folder = tmp_path_factory.mktemp("runs")
    store = open_store(str(folder / "store"))
    trees = {}
    for name in DEVICES:
        source = folder / name
        source.mkdir()
        (source / "config.json").write_text(name)
        facts = MODELS[name].model_dump(mode="json")
        trees[name] = store.put(source, kind="checkpoint", metadata={"facts": facts})

    def call(model: str, gpu: str, goal: str, recipe: str = ""):
        return decisions.begin(
            model=trees[model], store_uri=store.uri, name="m", goal=goal, target=gpu, recipe=recipe,
            max_attempts=5, evaluation=Evaluation(),
        )  # fmt: skip

    return call


def has_its_whole_context(model: str, gpu: str) -> bool:
    """Whether one device holds the weights in 16 bits, and beside them all tokens that the model reads."""
    facts, room = MODELS[model], target(gpu).memory_bytes
    tokens = 2 * facts.layers * facts.kv_heads * facts.head_dim * 2 * facts.max_position_embeddings
    return 0.9 * (room - facts.bytes) >= tokens


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", DEVICES)
@pytest.mark.parametrize("goal", GOALS)
def test_every_run_begins_with_an_attempt(begin, model, gpu, goal):
    """Or is refused when it is planned: a context that is whole cannot grow."""
    if GOALS[goal].measure.computed and has_its_whole_context(model, gpu):
        with pytest.raises(InputError, match=f"has nothing to gain on {gpu}: .* it can read on one {gpu}; write 'hi"):
            begin(model, gpu, goal)
        return
    state = decisions.prepare(begin(model, gpu, goal))
    facts, machine, recipe = MODELS[model], target(gpu), state.recipe
    assert state.verdict is None and not (recipe.prune or recipe.distill or recipe.quantize)
    assert refusal(recipe, machine, facts) is None and memory(facts, recipe, machine).fits
    if GOALS[goal].least_batch == 1:  # a larger one may take more
        assert recipe.engine.world_size == DEVICES[model][gpu]
    count = recipe.engine.world_size
    assert state.why.startswith(f"the model unchanged, in 16 bits on {count if count > 1 else 'one'} {gpu}, at most")
    measured = state.model_copy(update={"baseline": Brief(recipe=recipe, verdict=BASELINE)})
    assert decisions.decide(measured) == "retry"
    assert decisions.prepare(decisions.next_attempt(measured)).verdict is None


@pytest.mark.parametrize(
    ("goal", "devices", "batch"),
    [
        ("lower_latency", 2, 4),
        # 141 GB and sixteen sequences of KV cache take four of 80 GB
        ("higher_throughput", 4, 64),
    ],
)
def test_large_batches_have_room_where_the_goal_is_made_of_them(begin, goal, devices, batch):
    engine = begin("llama-3.1-70b", "h100", goal).recipe.engine
    assert (engine.world_size, engine.max_batch_size) == (devices, batch)


def test_the_users_devices_are_the_least(begin):
    recipe = "{quantize: {format: fp8}, engine: {backend: trtllm, tensor_parallel_size: 2, max_batch_size: 3}}"
    engine = begin("llama-3.1-8b", "h100", "lower_latency", recipe).recipe.engine
    assert (engine.tensor_parallel_size, engine.max_batch_size) == (2, 3)


def test_the_torch_engine_shares_the_unchanged_model_too(begin):
    """An attempt is on one device with it; what is compared with it needs two."""
    state = begin("llama-3.1-70b", "h200", "fit_larger_model", "engine: {backend: torch}")
    assert state.recipe.engine.backend == "torch" and state.recipe.engine.world_size == 2
    assert decisions.next_attempt(
        state.model_copy(update={"baseline": Brief(recipe=state.recipe, verdict=BASELINE)})
    ).recipe.engine.world_size == 1  # fmt: skip


def test_a_workload_sizes_the_baseline(begin):
    length = "{mean: 500, p95: 1000, max: 2000}"
    workload = f"workload: {{input: {length}, output: {length}, concurrency: 48}}"
    engine = begin("llama-3.1-70b", "h100", "higher_throughput", workload).recipe.engine
    assert (engine.world_size, engine.max_batch_size, engine.max_seq_len) == (4, 48, 4000)


@pytest.mark.parametrize(
    ("model", "machine", "sentence"),
    [
        # 810 GB: eight devices of 141 GB or more
        (
            "llama-3.1-405b",
            target("h100"),
            "target: the unchanged model, which every attempt is compared with, has 812 GB in 16 bits, and 8 h100 do "
            "not serve it .*; write target: 'h200' or 'b200', of which 8 hold it$",
        ),
        (
            "llama-3.1-8b",
            target("cpu", 12 * GB),
            "has 16 GB in 16 bits, and this machine gives it 12 GB of memory .*; use a machine with more memory",
        ),
    ],
)
def test_what_holds_no_unchanged_model_is_refused_with_what_does(model, machine, sentence):
    assert decisions.ladder("fit_larger_model", MODELS[model], machine, Recipe()), "an attempt would fit"
    with pytest.raises(InputError, match=sentence):
        decisions.outline("fit_larger_model", MODELS[model], machine, Recipe())


def test_the_outline_is_plain_data():
    told = decisions.outline("lower_latency", MODELS["llama-3.1-70b"], target("h100"), Recipe())
    assert told["baseline"]["placement"] == {
        "devices": 2, "backend": "trtllm", "tensor_parallel_size": 2, "pipeline_parallel_size": 1,
        "max_batch_size": 4, "max_seq_len": 4096, "max_num_tokens": 8192,
    }  # fmt: skip
    assert told["baseline"]["why"] == "the model unchanged, in 16 bits on 2 h100, at most 4 x 4,096 tokens"
    ladder = decisions.ladder("lower_latency", MODELS["llama-3.1-70b"], target("h100"), Recipe())
    assert [Recipe.parse(rung["recipe"]) for rung in told["rungs"]] == [rung.recipe for rung in ladder]
    assert [rung["why"] for rung in told["rungs"]] == [rung.why for rung in ladder]


def test_the_outline_says_what_was_left_out():
    torch = Recipe.parse("engine: {backend: torch}")
    told = decisions.outline("lower_latency", MODELS["llama-3.1-70b"], target("h100"), torch)
    refused = {other["title"]: other["why"] for other in told["refused"]}
    assert refused["int8_wo, down_proj in 16 bits"].endswith("of 80.00 GB: does not fit")
    assert not set(refused) & {rung["title"] for rung in told["rungs"]}
