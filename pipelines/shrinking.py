"""Makes a compiled pipeline small enough for a backend, which keeps it in the Argo Workflow of each run: 1 MiB at most.

KFP's compiler writes a component anew for every task that uses it: an attempt's eight stages, ten times. Two components
are the same when their interfaces, their containers and their settings for Kubernetes are, or when they are graphs of
the same tasks; the names of tasks, their outputs and what the page of a run shows stay. The backend keeps artifacts by
run, task and a random name, so that nothing collides. And it repeats a component's interface, source and inputs up to
six times for each task, so that what nothing reads is left out: docstrings, the descriptions of what only tasks take
(those of the run's form stay), and the copies of placeholders that the compiler gives a task beside what they stand
for. What runs here is not shrunk: `kfp.local` names folders by component.
"""

from __future__ import annotations

import ast
import hashlib
import json
from typing import Any

from google.protobuf import json_format
from kfp.dsl.base_component import BaseComponent


def shrink(pipeline: BaseComponent) -> None:
    """Leaves one of each component in a compiled pipeline, and of each what is read."""
    _leave_docstrings_out(pipeline)
    _leave_descriptions_out(pipeline)
    _leave_copies_out(pipeline)
    _merge_components(pipeline)


def _leave_docstrings_out(pipeline: BaseComponent) -> None:
    executors = pipeline.pipeline_spec.deployment_spec.fields["executors"].struct_value.fields
    for executor in executors.values():
        command = executor.struct_value.fields["container"].struct_value.fields["command"].list_value.values
        command[-1].string_value = _without_docstring(command[-1].string_value)


def _without_docstring(source: str) -> str:
    """Returns the source of a component, a function behind imports, without the function's docstring."""
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    lines = source.splitlines(keepends=True)
    if ast.get_docstring(function) is not None:
        del lines[function.body[0].lineno - 1 : function.body[0].end_lineno]
    return "".join(lines)


def _leave_descriptions_out(pipeline: BaseComponent) -> None:
    for component in pipeline.pipeline_spec.components.values():
        for ports in (component.input_definitions, component.output_definitions):
            for port in (*ports.parameters.values(), *ports.artifacts.values()):
                port.ClearField("description")


def _leave_copies_out(pipeline: BaseComponent) -> None:
    """Takes from tasks the inputs that their components do not have and that only repeat another's placeholder."""
    spec = pipeline.pipeline_spec
    for component in (spec.root, *spec.components.values()):
        for task in component.dag.tasks.values():
            wanted = spec.components[task.component_ref.name].input_definitions.parameters
            for name, given in list(task.inputs.parameters.items()):
                text = given.runtime_value.constant.string_value
                if name not in wanted and text.startswith("{{$.inputs.parameters["):
                    del task.inputs.parameters[name]


def _merge_components(pipeline: BaseComponent) -> None:
    """Keeps equal components under the first of their names, and lets all their tasks use it."""
    spec, platforms = pipeline.pipeline_spec, pipeline.platform_spec.platforms
    executors = spec.deployment_spec.fields["executors"].struct_value.fields
    settings = [platform.deployment_spec.executors for platform in platforms.values()]
    digests: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in digests:
            body = json_format.MessageToDict(spec.components[name])
            if label := body.pop("executorLabel", None):
                parts = [executors[label], *(found[label] for found in settings if label in found)]
                body["executor"] = [json_format.MessageToDict(part) for part in parts]
            for task in body.get("dag", {}).get("tasks", {}).values():
                task["componentRef"] = digest(task["componentRef"]["name"])
            digests[name] = _digest(body)
        return digests[name]

    first: dict[str, str] = {}
    for name in sorted(spec.components, key=lambda name: (len(name), name)):
        first.setdefault(digest(name), name)
    for name in set(spec.components) - set(first.values()):
        del spec.components[name]
    used = {component.executor_label for component in spec.components.values()}
    for holder in (executors, *settings):
        for label in set(holder) - used:
            del holder[label]
    for component in (spec.root, *spec.components.values()):
        for task in component.dag.tasks.values():
            task.component_ref.name = first[digests[task.component_ref.name]]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
