"""A pipeline for a backend is small, and the same pipeline."""

from __future__ import annotations

import ast
import copy
from typing import Any

import pytest
from google.protobuf import json_format

from trimtab.pipelines.optimize import optimize_pipeline
from trimtab.pipelines.rebuild import rebuild_pipeline
from trimtab.pipelines.shrinking import shrink
from trimtab.stages.profile import Profile

PROFILE = Profile.parse("{gpu: {node_selector: {gpu: a100}}, labels: {team: a}, stages: {distill: {memory: 64Gi}}}")


def meaning(pipeline: Any) -> dict[str, Any]:
    """The root with every task's component in its place, and what its container and its pod are."""
    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    platforms = json_format.MessageToDict(pipeline.platform_spec).get("platforms", {})
    settings = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})

    def resolved(body: dict[str, Any], is_root: bool = False) -> dict[str, Any]:
        for side in () if is_root else ("inputDefinitions", "outputDefinitions"):
            for ports in body.get(side, {}).values():
                for port in ports.values():
                    port.pop("description", None)
        label = body.pop("executorLabel", None)
        if label:
            container = dict(spec["deploymentSpec"]["executors"][label]["container"])
            *command, source = container["command"]
            body |= {"container": {**container, "command": [*command, runs(source)]}, "pod": settings.get(label)}
        for task in body.get("dag", {}).get("tasks", {}).values():
            task["component"] = inner = resolved(copy.deepcopy(spec["components"][task.pop("componentRef")["name"]]))
            wanted = inner.get("inputDefinitions", {}).get("parameters", {})
            given = task.get("inputs", {}).get("parameters", {})
            task.setdefault("inputs", {})["parameters"] = {
                name: value for name, value in given.items() if name in wanted or name.startswith("pipelinechannel--")
            }
        return body

    return resolved(json_format.MessageToDict(pipeline.pipeline_spec)["root"], is_root=True)


def runs(source: str) -> str:
    """A source without its docstrings, as Python sees it."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


@pytest.mark.parametrize("build", [optimize_pipeline, rebuild_pipeline])
@pytest.mark.parametrize("profile", [None, PROFILE])
def test_every_task_is_what_it_was(build, profile):
    shrunk = build(3, profile)
    shrink(shrunk)
    assert meaning(shrunk) == meaning(build(3, profile))
    spec = shrunk.pipeline_spec
    labels = [component.executor_label for component in spec.components.values() if component.executor_label]
    executors = spec.deployment_spec.fields["executors"].struct_value.fields
    assert sorted(labels) == sorted(executors), "no executor is left over"
    assert not any('"""' in executor.struct_value.fields["container"].struct_value.fields["command"].list_value.values[
        -1].string_value for executor in executors.values())  # fmt: skip


def test_attempts_share_one_component():
    pipeline = optimize_pipeline(3)
    shrink(pipeline)
    uses = [
        task.component_ref.name
        for component in (pipeline.pipeline_spec.root, *pipeline.pipeline_spec.components.values())
        for task in component.dag.tasks.values()
    ]
    assert uses.count("comp-attempt") == 4 and "comp-attempt-2" not in pipeline.pipeline_spec.components
