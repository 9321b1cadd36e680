"""Each room's component by itself, as somebody who composes a pipeline of their own calls it: kfp.local, a tiny model.

A component gets the document of an attempt, and artifacts that name trees; it returns the next document. kfp.local
takes artifacts from an importer alone, so those that have inputs stand behind one.
"""

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from kfp import dsl, local
from releases import Filed, Released

from trimtab import components
from trimtab.base.errors import Failure
from trimtab.components.fetch.source import fetch as fetch_model
from trimtab.judge import Verdict
from trimtab.loop.documents import load, save
from trimtab.loop.state import Brief, State, fail
from trimtab.recipe import Recipe
from trimtab.store import Tree, open_store
from trimtab.store.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder: Path, store: Store) -> Tree:
    return fetch_model(str(folder), store)


@pytest.fixture(autouse=True)
def on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRIMTAB_RUN_PID", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # KFP warns of images, which this machine does not use
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "runs"), raise_on_error=True)
        yield


def component(room: str, name: str) -> Any:
    return getattr(importlib.import_module(f"trimtab.components.{room}.component"), name)


def call(room: str, name: str, state: str, folder: Path, **inputs: type) -> str:
    """Runs a component by itself and returns the document that it returned; artifacts come from outside."""
    (folder / "given").write_text("{}")

    @dsl.pipeline(name="alone")
    def alone(state: str) -> str:
        imported = {
            key: dsl.importer(artifact_uri=str(folder / "given"), artifact_class=kind, reimport=False).output
            for key, kind in inputs.items()
        }
        return component(room, name)(state=state, **imported).outputs["Output"]

    return alone(state=state).output


def attempt(store: Store, model: Tree, recipe: str, **trees: Tree) -> str:
    asked = {"goal": "lower_cost", "target": "cpu", "recipe": Recipe.parse(recipe)}
    return save(State(store=store.uri, model=model, attempt=1, trees=trees, **asked))


def test_fetch(folder: Path, store: Store, model: Tree) -> None:
    task = component("fetch", "fetch")(model=str(folder), store=store.uri)
    assert Tree.parse(task.outputs["Output"]).digest == model.digest
    assert task.outputs["source"].metadata["tree_digest"] == model.digest


#: Room, component, recipe, the inputs that are artifacts, and the tree that it makes. Their work has tests of its own,
#: which import torch: here its result is in the store already, as of an earlier run.
STAGES = [
    ("calibration", "calibrate", "{quantize: {format: int8_sq}, calibrate: {samples: 2, length: 32}}",
     {"checkpoint": dsl.Model}, "calibration"),
    ("pruning", "prune", "prune: {method: magnitude, sparsity: 0.5}",
     {"checkpoint": dsl.Model, "calibration": dsl.Dataset}, "checkpoint"),
    ("distillation", "distill", "distill: {tokens: 256, batch_size: 2, length: 32}",
     {"checkpoint": dsl.Model}, "checkpoint"),
    ("quantization", "quantize", "quantize: {format: int8_wo}",
     {"checkpoint": dsl.Model, "calibration": dsl.Dataset}, "export"),
    ("engine", "build_engine", "{}", {"export": dsl.Model}, "engine"),
]  # fmt: skip


@pytest.mark.parametrize(("room", "name", "recipe", "inputs", "made"), STAGES, ids=[name for _, name, *_ in STAGES])
def test_a_stage(room, name, recipe, inputs, made, store: Store, model: Tree, tmp_path: Path) -> None:
    begun = load(attempt(store, model, recipe))
    filed = Filed(store, tmp_path).walk(begun).trees
    state = load(call(room, name, attempt(store, model, recipe), tmp_path, **inputs))
    assert state.verdict is None and state.trees[made] == filed[made] != model
    assert store.manifest(state.trees[made]).files and set(state.seconds.values()) == {0.0}


def test_a_stage_that_has_nothing_to_do_passes_the_document_on(store: Store, model: Tree, tmp_path: Path) -> None:
    given = attempt(store, model, "quantize: {format: int8_wo}")
    state = load(call("distillation", "distill", given, tmp_path, checkpoint=dsl.Model))
    assert state.trees == {} and state.verdict is None


def test_validate_keeps_a_verdict_that_is_there(store: Store, model: Tree, tmp_path: Path) -> None:
    """What a stage before it ended in; measuring has tests of its own, which ask for minutes."""
    state = load(attempt(store, model, "quantize: {format: int8_wo}"))
    before = Brief(recipe=Recipe(), verdict=Verdict(outcome="baseline", reason="unchanged"))
    failed = fail(state.model_copy(update={"baseline": before}), "quantize", Failure("export_damaged", "layer 1"))
    judged = load(call("validation", "validate", save(failed), tmp_path, engine=dsl.Artifact))
    assert judged.is_over and judged.history[-1].verdict.failure_class == "export_damaged"
    (page,) = tmp_path.glob("runs/*/validate/report")
    assert "Layer 1." in page.read_text()


def test_the_gate_releases_what_was_accepted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "released"))
    run = Released(store, tmp_path)
    task = component("deployment", "gate")(state=save(run.run.finished))
    assert task.outputs["Output"].startswith(f"{store.uri}/releases/tiny/")
    told, base = task.outputs["released"].metadata, run.run.finished.model
    assert (told["base_model_uri"], told["base_model_digest"]) == (base.uri, base.digest), "where it comes from"
    assert told["release"] == task.outputs["Output"] and told["tree_digest"] != base.digest
    assert told.keys() >= {"framework", "model_format_name", "model_format_version", "quantization", "bits"}


def test_a_rollout_that_nobody_asked_for_serves_nowhere() -> None:
    task = component("deployment", "roll_out")(release="/store/releases/tiny/1", rollout="", run="1")
    assert task.outputs["Output"] == "not_asked"


def test_every_room_has_one_here() -> None:
    rooms = {path.parent.name for path in Path(components.__file__).parent.glob("*/component.py")}
    assert rooms == {room for room, *_ in STAGES} | {"fetch", "validation", "deployment"}
