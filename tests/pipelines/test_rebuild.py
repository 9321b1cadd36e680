"""The pipeline `rebuild`: its compiled form, and runs of the real DAG with and without a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import local
from releases import file_release

from trimtab.catalog.goals import GOALS
from trimtab.components.fetch.source import fetch
from trimtab.loop import decisions
from trimtab.model.hardware import TARGETS
from trimtab.pipelines.commands import main
from trimtab.pipelines.loop import image_names
from trimtab.pipelines.package import REVIEW
from trimtab.pipelines.rebuild import rebuild_pipeline
from trimtab.pipelines.tasks import forked
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages.profile import Profile
from trimtab.store import open_store

#: What only a cluster has.
pytestmark = pytest.mark.filterwarnings("ignore:Task .* have no effect in the current local runner")

PROFILE = "{images: {cuda: registry/cuda:2}, environment: {AWS_REGION: here}, stages: {fetch: {memory: 16Gi}}}"


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pipeline as `trimtab compile` writes it, ten attempts unrolled, for a cluster with GPUs."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "profile.yaml").write_text(PROFILE)
    options = ["--profile", str(folder / "profile.yaml"), "--image", "registry/cpu:1", "--pipeline", "rebuild"]
    assert main.main(["compile", "-o", str(folder / "rebuild.yaml"), *options]) == 0
    assert (folder / "rebuild.yaml").stat().st_size < 2**20
    return next(yaml.load_all((folder / "rebuild.yaml").read_text(), yaml.CSafeLoader))


def test_one_task_decides_over_all_others(ir):
    tasks = ir["root"]["dag"]["tasks"]
    assert list(tasks) == ["condition-1", "review"]
    policy = tasks["condition-1"]["triggerPolicy"]["condition"]
    assert policy == "inputs.parameter_values['pipelinechannel--review-Output'] == 'rebuild'"
    whole = ir["components"]["comp-condition-1"]["dag"]["tasks"]
    names = [task["taskInfo"]["name"] for task in whole.values()]
    assert {"baseline", "attempt 1", "retry after attempt 1?", "summary", "deploy gate"} <= set(names)
    assert [name for name, task in whole.items() if task["taskInfo"]["name"] == "deploy gate"] == ["gate"]
    assert whole["roll-out"]["inputs"]["parameters"]["release"]["taskOutputParameter"]["producerTask"] == "gate"
    assert any(
        "roll-out-Output'] == 'rolled_back'" in task.get("triggerPolicy", {}).get("condition", "")
        for task in whole.values()
    )


def test_the_condition_reads_the_name_that_resolves_everywhere(ir):
    """kfp.local resolves a lone condition beside its producer by the name `Output` only."""
    outputs = ir["components"]["comp-review"]["outputDefinitions"]
    assert set(outputs["parameters"]) == {"Output", "state"} and set(outputs["artifacts"]) == {"changes"}


def test_the_images_are_materials(ir):
    inputs = ir["root"]["dag"]["tasks"]["review"]["inputs"]["parameters"]
    assert inputs["images"]["runtimeValue"]["constant"] == "registry/cpu:1 registry/cuda:2"
    containers = [executor["container"] for executor in ir["deploymentSpec"]["executors"].values()]
    named = {container["image"] for container in containers if "{{" not in container["image"]}
    assert named == {"registry/cpu:1", "registry/cuda:2"}
    assert ir["deploymentSpec"]["executors"]["exec-review"]["container"]["resources"]["resourceMemoryLimit"] == "16Gi"


def test_the_form(ir):
    """The same parameters as `optimize`, described, with lists to choose from."""
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    assert parameters.keys() == {
        "model", "store", "goal", "target", "recipe", "max_attempts", "name", "evaluation", "rollout", "registry",
    }  # fmt: skip
    assert all(parameter["description"] for parameter in parameters.values())
    assert parameters["goal"]["literals"] == list(GOALS) and parameters["target"]["literals"] == list(TARGETS)


def test_objects_for_a_cluster_that_keeps_pipelines_itself(tmp_path):
    output = tmp_path / "objects.yaml"
    assert main.main(["compile", "--objects", "-o", str(output), "--pipeline", "rebuild", "--max-attempts", "1"]) == 0
    pipeline, version = yaml.load_all(output.read_text(), yaml.CSafeLoader)
    assert pipeline["metadata"]["name"] == version["spec"]["pipelineName"] == "trimtab-rebuild"
    assert version["metadata"]["name"].startswith("trimtab-rebuild-")


def test_no_such_pipeline(tmp_path, capsys):
    assert main.main(["compile", "-o", str(tmp_path / "x.yaml"), "--pipeline", "rebuilt"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "pipeline: 'rebuilt' is not valid; write 'rebuild' (valid: optimize, rebuild)" in said


@pytest.fixture
def released(tmp_path: Path, write_model: Callable[..., Path]) -> dict[str, Any]:
    """What a run is asked for that would make what the last release is made of."""
    store = open_store(str(tmp_path / "store"))
    model = fetch(str(write_model(tmp_path / "model")), store)
    asked = {"name": "tiny", "goal": "fit_larger_model", "target": "cpu", "recipe": "", "max_attempts": 1}
    state = decisions.begin(
        model=model, store_uri=store.uri, evaluation=Evaluation(), images=image_names(Profile()), **asked
    )
    state = state.model_copy(update={"recipe": Recipe.parse("quantize: {format: int8_wo}")})
    file_release(store, state, store.put_json("export", {}))
    return {**asked, "store": store.uri, "model": str(tmp_path / "model")}


def run(arguments: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Runs the DAG, whatever its end; returns the folders of the tasks that ran, by their names in the pipeline."""
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder), raise_on_error=False)
    with forked():
        rebuild_pipeline(unrolled=1)(**arguments)
    return {path.name: path for path in folder.glob("rebuild-*/*")}


def test_nothing_changed(released, tripwire, tmp_path):
    """The run is one task, which says so; no model was touched."""
    tasks = run(released, tmp_path / "runs")
    assert list(tasks) == ["review"]
    release = f"{released['store']}/releases/tiny/000001"
    assert (tasks["review"] / "changes").read_text().startswith(f"# Nothing changed: {release} stands")
    assert not tripwire.touched and open_store(released["store"]).newest("tiny") == release


@pytest.mark.slow
def test_something_changed(released, tripwire, tmp_path, monkeypatch):
    """The run is an ordinary one, through to the gate: here of a baseline that fails."""
    monkeypatch.setenv("FAILING", "export_damaged:the likelihood is nan")
    tasks = run({**released, "goal": "lower_latency"}, tmp_path / "runs")
    assert {"review", "prepare", "build-engine", "summarize", "gate"} <= tasks.keys() and tripwire.touched
    assert "- goal: fit_larger_model → lower_latency" in (tasks["review"] / "changes").read_text()
    assert "the likelihood is nan" in (tasks["summarize"] / "summary").read_text()
    assert not (tasks["gate"] / "executor_output.json").exists(), "nothing is released"


def test_the_first_task_has_a_name_for_people(ir):
    assert ir["root"]["dag"]["tasks"]["review"]["taskInfo"]["name"] == REVIEW
