"""Each room's component by itself, as somebody who composes a pipeline of their own calls it: kfp.local, a tiny model.

A component gets the document of an attempt, and artifacts that name trees; it returns the next document.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from kfp import dsl, local
from releases import Released

from trimtab import components
from trimtab.base.errors import Failure
from trimtab.components.fetch.source import fetch as fetch_model
from trimtab.judge import Verdict
from trimtab.loop.documents import load, save
from trimtab.loop.state import Brief, State, fail
from trimtab.recipe import Recipe
from trimtab.stages.face import describe_tree
from trimtab.store import Tree, open_store
from trimtab.store.store import Store

pytestmark = pytest.mark.slow


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


def named(tree: Tree, folder: Path, kind: type = dsl.Model) -> Any:
    """An artifact that names a tree, as the component before would have left it."""
    artifact = kind(name="given", uri=str(folder / "given"))
    describe_tree(artifact, tree)
    return artifact


def attempt(store: Store, model: Tree, recipe: str, **trees: Tree) -> str:
    asked = {"goal": "lower_cost", "target": "cpu", "recipe": Recipe.parse(recipe)}
    return save(State(store=store.uri, model=model, attempt=1, trees=trees, **asked))


def test_fetch(folder: Path, store: Store, model: Tree) -> None:
    task = component("fetch", "fetch")(model=str(folder), store=store.uri)
    assert Tree.parse(task.outputs["Output"]).digest == model.digest
    assert task.outputs["source"].metadata["tree_digest"] == model.digest


#: Room, component, recipe, the inputs that are artifacts, and the tree that it makes.
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
    given = {key: named(model, tmp_path, kind) for key, kind in inputs.items()}
    task = component(room, name)(state=attempt(store, model, recipe), **given)
    state = load(task.outputs["Output"])
    assert state.verdict is None and state.trees[made].digest != model.digest
    assert store.manifest(state.trees[made]).files
    assert "metrics" in task.outputs


def test_a_stage_that_has_nothing_to_do_passes_the_document_on(store: Store, model: Tree, tmp_path: Path) -> None:
    task = component("distillation", "distill")(
        state=attempt(store, model, "quantize: {format: int8_wo}"), checkpoint=named(model, tmp_path)
    )
    state = load(task.outputs["Output"])
    assert state.trees == {} and task.outputs["distilled"].metadata["tree_digest"] == model.digest


def test_validate_keeps_a_verdict_that_is_there(store: Store, model: Tree, tmp_path: Path) -> None:
    """What a stage before it ended in; measuring has tests of its own, which ask for minutes."""
    state = load(attempt(store, model, "quantize: {format: int8_wo}"))
    before = Brief(recipe=Recipe(), verdict=Verdict(outcome="baseline", reason="unchanged"))
    failed = fail(state.model_copy(update={"baseline": before}), "quantize", Failure("export_damaged", "layer 1"))
    task = component("validation", "validate")(state=save(failed), engine=named(model, tmp_path, dsl.Artifact))
    judged = load(task.outputs["Output"])
    assert judged.is_over and judged.history[-1].verdict.failure_class == "export_damaged"
    assert "layer 1" in Path(task.outputs["report"].path).read_text()


def test_the_gate_releases_what_was_accepted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "released"))
    run = Released(store, tmp_path)
    task = component("deployment", "gate")(state=save(run.run.finished))
    assert task.outputs["Output"].startswith(f"{store.uri}/releases/tiny/")


def test_a_rollout_that_nobody_asked_for_serves_nowhere() -> None:
    task = component("deployment", "roll_out")(release="/store/releases/tiny/1", rollout="", run="1")
    assert task.outputs["Output"] == "not_asked"


def test_every_room_has_one_here() -> None:
    rooms = {path.parent.name for path in Path(components.__file__).parent.glob("*/component.py")}
    assert rooms == {room for room, *_ in STAGES} | {"fetch", "validation", "deployment"}
