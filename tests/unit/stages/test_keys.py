"""What a result is found by: what of its surroundings a stage declares, and nothing else."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from facts import LLAMA_8B

from trimtab import stages
from trimtab.base import child, environment
from trimtab.judge import Verdict
from trimtab.loop.documents import load, save
from trimtab.loop.state import Brief, State
from trimtab.model.hardware import target
from trimtab.planning.matrix import ladder
from trimtab.recipe import Recipe
from trimtab.stages import STAGES, Stage
from trimtab.stages import looks as validation
from trimtab.store import Store, open_store
from trimtab.store.tree import Tree

CHECKPOINT = Tree(uri=f"file:///x/trees/{'a' * 64}", digest="a" * 64)
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
L4 = {"gpu": "NVIDIA L4", "compute_capability": "8.9"}
IMAGE = {
    "torch": "2.13.0", "transformers": "5.14.1", "nvidia-modelopt": "0.47.0", "lm-eval": "0.4.13",
    "tensorrt_llm": "1.2.1", "tensorrt": "10.14", "vllm": "0.24.0", "trimtab": "0.1.0",
}  # fmt: skip


@pytest.fixture
def placed(monkeypatch):
    """A function: this process is in an image with these versions, on this device."""

    def place(device=H100, **versions: str) -> None:
        has = IMAGE | {name.replace("_", "-") if name != "tensorrt_llm" else name: v for name, v in versions.items()}
        monkeypatch.setattr(environment, "installed", lambda packages: {p: has[p] for p in packages if p in has})
        monkeypatch.setattr(environment, "device", lambda: device)

    place()
    return place


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path / "store"))


def key(name: str, recipe: Recipe) -> str:
    stage = STAGES[name]
    parameters = stage.parameters(recipe)
    here = stage.environment(parameters).here(recipe.engine.backend)
    return stage.key(parameters, dict.fromkeys(stage.inputs, CHECKPOINT), here)


def measured_key(stage: Stage, backend: str) -> str:
    return stage.key({}, {"engine": CHECKPOINT}, stage.environment({}).here(backend))


@pytest.mark.parametrize("goal", ["lower_latency", "fit_larger_model"])
@pytest.mark.parametrize(
    ("one", "other"), [*itertools.combinations(("l4", "l40s", "rtx4090", "h100", "h200", "b200"), 2)]
)
def test_no_engine_of_one_gpu_answers_for_another(goal, one, other, placed):
    """Exports may: they are numbers that any device reads."""
    engines = []
    for name in (one, other):
        placed(device={"gpu": name})
        engines.append({key("engine", rung.recipe) for rung in ladder(goal, LLAMA_8B, target(name))})
    assert not engines[0] & engines[1]


def test_an_export_is_one_for_all_gpus(placed):
    recipe = Recipe.parse("quantize: {format: fp8}")
    exports = []
    for device in (H100, L4):
        placed(device=device)
        exports.append(key("quantize", recipe))
    assert exports[0] == exports[1]


EVERYTHING = (
    "{{prune: {{method: depth, blocks: 1}}, distill: {{tokens: 99, generate: 9, stored_logits: 8}}, "
    "quantize: {{format: mixed, effective_bits: 6}}, engine: {{backend: {backend}}}}}"
)
TENSOR_STAGES = {"calibrate", "prune", "generate", "teach", "distill", "recalibrate"}
ROUNDING_STAGES = {"sensitivity", "quantize", "integrity"}
SERVING_STAGES = {"engine", "evaluate", "speed"}


@pytest.mark.parametrize(
    ("upgraded", "backend", "anew"),
    [
        ({"torch": "3.0"}, "torch", TENSOR_STAGES | ROUNDING_STAGES | SERVING_STAGES),
        ({"transformers": "5.15"}, "torch", TENSOR_STAGES | ROUNDING_STAGES | SERVING_STAGES),
        ({"nvidia_modelopt": "0.60"}, "torch", ROUNDING_STAGES),
        ({"lm_eval": "0.5"}, "torch", {"evaluate"}),
        ({"tensorrt_llm": "1.3"}, "trtllm", SERVING_STAGES),
        ({"tensorrt": "10.15"}, "trtllm-legacy", SERVING_STAGES),
        ({"tensorrt_llm": "1.3", "vllm": "0.25"}, "torch", set()),
        ({"vllm": "0.25"}, "vllm", SERVING_STAGES),
        ({"vllm": "0.25"}, "trtllm", set()),
        ({"trimtab": "0.2.0"}, "torch", set()),
        ({"device": L4}, "torch", SERVING_STAGES | {"integrity"}),
    ],
)
def test_a_new_image_makes_new_results_of_what_it_shapes(upgraded, backend, anew, placed):
    recipe = Recipe.parse(EVERYTHING.format(backend=backend))
    measured = {"evaluate": validation.EVALUATE, "speed": validation.COMPARE_SPEED}

    def keys() -> dict[str, str]:
        return {
            **{name: key(name, recipe) for name in STAGES},
            **{name: measured_key(stage, backend) for name, stage in measured.items()},
            "integrity": measured_key(validation.INTEGRITY, "torch"),
        }

    before = keys()
    placed(**upgraded)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == anew


def test_training_with_the_rounding_of_a_format_is_shaped_by_what_rounds_to_it(placed):
    plain = Recipe.parse("{distill: {tokens: 99}, quantize: {format: int4_rtn}}")
    rounded = Recipe.parse("{distill: {tokens: 99, quantization_aware: true}, quantize: {format: int4_rtn}}")
    before = [key("distill", recipe) for recipe in (plain, rounded)]
    placed(nvidia_modelopt="0.60")
    assert [key("distill", recipe) == old for recipe, old in zip((plain, rounded), before, strict=True)] == [
        True,
        False,
    ]


def test_a_speed_of_one_gpu_never_answers_for_another(placed, store, tmp_path, monkeypatch):
    """Through the real store: what was measured on the first device is found there, and measured anew elsewhere."""
    speeds = {"NVIDIA H100 80GB HBM3": 351.0, "NVIDIA L4": 38.0}

    def call(work, *, output, **_):
        speed = speeds[environment.device()["gpu"]]
        with open(f"{output}/speed.json", "w") as file:
            json.dump(speed, file)
        return child.Done({"decode_tokens_per_second": speed}, 1.0, 1000)

    monkeypatch.setattr(child, "call", call)
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "engine.json").write_text("{}")
    engine, found = store.put(folder, kind="engine"), []
    for device in (H100, L4, H100, L4):
        placed(device=device)
        result = stages.cached(store, validation.COMPARE_SPEED, {"rounds": 3}, {"engine": engine})
        found.append((result.metrics["decode_tokens_per_second"], result.hit))
    assert found == [(351.0, False), (38.0, False), (351.0, True), (38.0, True)]
    here = validation.COMPARE_SPEED.environment({}).here("torch")
    recorded = store.lookup(validation.COMPARE_SPEED.key({"rounds": 3}, {"engine": engine}, here))
    assert recorded["environment"]["device"] == L4, "a result says under which conditions it holds"


@pytest.fixture
def begun(store, tmp_path) -> State:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("w")
    recipe = Recipe.parse("quantize: {format: int8_wo}")
    model = store.put(folder, kind="checkpoint")
    return State(store=store.uri, goal="lower_latency", target="h100", model=model, recipe=recipe, attempt=1)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({}, "0"),  # the task's image is that which made the result
        ({"nvidia_modelopt": "0.60"}, "1"),  # upgraded: there is none of this image
        (None, "1"),  # no task of this image has run in this run, so nothing is known
    ],
)
def test_prepare_follows_the_libraries_of_the_image_that_will_do_the_work(seen, expected, begun, placed, monkeypatch):
    """`prepare` itself runs in an image of its own, without GPU: what is installed there says nothing."""
    monkeypatch.setattr(child, "call", lambda *_, output, **__: child.Done({}, 1.0, 1))
    artifact = SimpleNamespace(path=f"{begun.store.removeprefix('file://')}.artifact", metadata={})
    stages.advance("quantize", begun)
    state = begun
    if seen is not None:
        placed(device=H100, **seen)
        baseline = begun.model_copy(update={"recipe": Recipe(), "attempt": 0})  # where the task passes on
        told = load(stages.run("quantize", save(baseline), artifact, None)).libraries
        state = begun.model_copy(update={"libraries": told})
    placed(device={"processor": "some", "threads": 2}, torch="2.11.0+cpu", nvidia_modelopt="0.1")
    assert stages.accelerators(state)["quantize"] == expected


def test_validation_keeps_its_devices_where_the_engine_is_found(begun, placed, monkeypatch):
    """A run that was killed in validation finds its engine, and must measure all the same."""
    monkeypatch.setattr(child, "call", lambda *_, output, **__: child.Done({}, 1.0, 1))
    recipe = Recipe.parse("engine: {backend: torch, tensor_parallel_size: 2}")
    state = begun.model_copy(update={"recipe": recipe})
    assert stages.advance("engine", state)[1].hit is False and stages.advance("engine", state)[1].hit
    needed = stages.accelerators(state)
    assert (needed["engine"], needed["validate"]) == ("2", "2")
    larger = Recipe.parse("engine: {tensor_parallel_size: 4}")
    baseline = Brief(recipe=larger, verdict=Verdict(outcome="baseline", reason="the model unchanged"))
    needed = stages.accelerators(state.model_copy(update={"baseline": baseline}))
    assert (needed["engine"], needed["validate"]) == ("2", "4"), "the baseline is measured beside it"


def test_the_device_is_read_without_torch():
    """The client and the small tasks have none; here there may be no GPU, and then it is the processor."""
    code = (
        "import sys; from trimtab.base import environment; d = environment.device(); "
        "assert 'torch' not in sys.modules; print(*d)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told in (["gpu", "compute_capability"], ["processor", "threads"])


@pytest.mark.parametrize(("threads", "expected"), [("3", 3), ("1", 1)])
def test_a_speed_is_one_of_so_many_threads(threads, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(environment, "_gpu", lambda: None)
    assert environment.device()["threads"] == expected


def test_a_torch_for_processors_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "_gpu", lambda: H100)
    for version, device in (("2.13.0+cpu", "processor"), ("2.13.0", "gpu"), ("2.13.0+cu128", "gpu")):
        monkeypatch.setattr(environment, "installed", lambda packages, version=version: {"torch": version})
        assert device in environment.device()
