"""The engine of the unchanged model: every run that makes sense begins with an attempt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.base import child, environment
from trimtab.base.errors import InputError
from trimtab.catalog.goals import GOALS
from trimtab.judge import Verdict
from trimtab.loop import decisions
from trimtab.loop.state import Brief
from trimtab.model.hardware import GB, Hardware, target
from trimtab.model.memory import memory
from trimtab.model.outline import outline
from trimtab.planning import placement
from trimtab.planning.checks import refusal
from trimtab.recipe import Engine, Recipe
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


def one(gpu: str) -> Hardware:
    """A machine with one of these GPUs."""
    return target(gpu).model_copy(update={"devices": 1})


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", DEVICES)
@pytest.mark.parametrize("goal", GOALS)
def test_every_model_is_compared_on_a_machine_with_one_gpu_or_refused_with_both_ways_out(model, gpu, goal):
    """Where an attempt fits: what the GPU does not hold is scored block by block, if no speed is asked for."""
    facts, machine = MODELS[model], one(gpu)
    fits, large = DEVICES[model][gpu] == 1, GOALS[goal].least_batch > 1
    try:
        decisions.ladder(goal, facts, machine, Recipe())
    except InputError as error:
        # No room beside four bits, or beside eight for a batch of sixteen.
        assert not fits and facts.parameters * (1 if large else 0.5) > 0.5 * machine.memory_bytes
        assert "does not fit; there may be room on more than the 1 of this machine" in str(error)
        return
    if fits and GOALS[goal].measure.computed and has_its_whole_context(model, gpu):
        return
    if fits or not GOALS[goal].measure.timed:
        told = decisions.outline(goal, facts, machine, Recipe())["baseline"]
        assert told["placement"]["devices"] == 1 and Recipe.parse(told["recipe"]).engine.by_block is not fits
        for words in (f"by block on one {gpu}, for this machine's one {gpu} does not hold", "no speed; slow, about"):
            assert (words in told["why"]) is not fits
        return
    ways = f"this machine's one {gpu} does not serve it .*; write target: '{gpu}' on a machine with more of them, or "
    with pytest.raises(InputError, match=f"{ways}goal: fit_larger_model or long_context, for which its speed is not"):
        decisions.outline(goal, facts, machine, Recipe())


#: 812 GB: eight devices of 141 GB or more.
HOLD_NOT = [
    (
        "llama-3.1-405b",
        target("h100"),
        "8 h100 do not serve it .*; write target: 'h200' or 'b200', of which 8 hold it",
        "on one h100, for 8 h100 do not hold its 812 GB",
    ),
    (
        "llama-3.1-8b",
        target("cpu", 12 * GB),
        "this machine's 12 GB of memory do not serve it .*; write target: 'cpu' on a machine with more memory",
        "on one cpu, for this machine's 12 GB of memory do not hold its 16 GB",
    ),
]


@pytest.mark.parametrize(("model", "machine", "refused", "told"), HOLD_NOT)
def test_what_nothing_holds_is_scored_block_by_block_or_refused_with_what_does(model, machine, refused, told):
    facts = MODELS[model]
    unchanged = decisions.outline("fit_larger_model", facts, machine, Recipe())["baseline"]
    assert unchanged["why"].startswith(f"the model unchanged, in 16 bits block by block {told}: likelihoods alone")
    engine = Recipe.parse(unchanged["recipe"]).engine
    assert engine.by_block and engine.backend == "torch" and engine.world_size == 1
    goal = "lower_latency"
    with pytest.raises(InputError, match=f"{refused}, or goal: fit_larger_model or long_context, for which its speed"):
        decisions.outline(goal, facts, machine, Recipe())


def test_what_does_not_even_hold_two_blocks_is_refused():
    """Two blocks of 1.7 GB in bfloat16, and embeddings and head of 4.2 GB, which stand there alone."""
    facts = MODELS["llama-3.1-70b"]
    tiny, like = target("cpu", 4 * GB), Engine(max_num_tokens=2048)
    with pytest.raises(InputError, match="4 GB of memory do not serve it .*; write target: 'cpu' on .* memory$"):
        placement.baseline("fit_larger_model", facts, tiny, like)
    recipe, _ = placement.baseline("fit_larger_model", facts, target("cpu", 9 * GB), like)
    assert recipe.engine.by_block


def test_a_run_on_a_machine_of_ones_own_has_its_gpus(begin, monkeypatch):
    """Two blocks of a 70B model on one GPU of 80 GB; in a cluster it is served by two."""
    monkeypatch.setattr(environment, "device", lambda: {"gpu": "NVIDIA H100", "compute_capability": "9.0"})
    monkeypatch.setattr(environment, "gpus", lambda: 1)
    assert begin("llama-3.1-70b", "h100", "fit_larger_model").recipe.engine.world_size == 2
    monkeypatch.setenv(child.RUN_PID, "1")
    state = begin("llama-3.1-70b", "h100", "fit_larger_model")
    assert state.recipe.engine.by_block and "for this machine's one h100 does not hold its 141 GB" in state.why
    assert begin("llama-3.1-70b", "a100-80", "fit_larger_model").recipe.engine.world_size == 2  # none of these is here


GENERATION = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["."], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_that_lets_a_model_write_is_refused_where_the_model_cannot(tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps({"q": f"{n} and one are", "a": str(n + 1)}) + "\n" for n in range(9)))
    (tmp_path / "tiny_writing.yaml").write_text(GENERATION.format(data=data))
    evaluation = Evaluation(tasks=("tiny_writing", "trimtab_arithmetic"), task_path=str(tmp_path))
    facts, told = MODELS["llama-3.1-8b"], "tasks: tiny_writing let a model write, and the unchanged one is scored block"
    with pytest.raises(InputError, match=f"{told}.*name tasks of multiple choice, or write target: 'cpu' on a machine"):
        decisions.outline("fit_larger_model", facts, target("cpu", 12 * GB), Recipe(), evaluation)
    assert decisions.outline("fit_larger_model", facts, target("cpu", 64 * GB), Recipe(), evaluation)


def test_a_recipe_does_not_ask_for_it():
    with pytest.raises(InputError, match="engine.by_block: is how a plan measures .* remove it"):
        decisions.ladder("lower_cost", MODELS["llama-3.1-8b"], target("h100"), Recipe.parse("engine: {by_block: true}"))


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
