"""Computes the Argo Workflow that Kubeflow Pipelines 2.17 makes of a compiled pipeline, and that Argo keeps of its run.

No backend is asked: this says what the sources of both say (`backend/src/v2/compiler/argocompiler` of
kubeflow/pipelines 2.17.0, `workflow/packer` of Argo Workflows 4.0), for one purpose, the bytes. Argo refuses to go on
with a Workflow above 1 MiB, of which it compresses the status of the nodes (gzip, base64), and ends the run in Error.

- A component's interface, container and settings for Kubernetes are an argument of the Workflow each, once a component;
  containers that are equal share one. Each graph is a template, where every task is two: a driver and what it drives.
- A driver gets all three, and the task; it returns the patch of a pod, which holds the task's inputs, outputs,
  interface and command as JSON in JSON. The patch stands in the driver's node, the executor's graph and the pod.
- Retries repeat a node: KFP's own those of the pods, and the `templateDefaults` that 2.17 installs, those of all.

Submitted Workflows agree within 2 % with those of a reconstruction that was equal to KFP's own golden files; a finished
one is good to about 10 %.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: What Argo takes for one object, in bytes.
MOST = 2**20
#: The templates that every Workflow has (drivers, executors with their volumes), its metadata, the root's inputs.
FIXED = 24_000
#: The parameters that are the URI of a document or a release; others are a few characters.
URIS = ("state", "told", "release", "model")
#: Where a state's document lies, and where artifacts do: as long as on a cluster with a bucket of its own.
STATE = "s3://models/trimtab/trees/{}"
ARTIFACT = "s3://mlpipeline/v2/artifacts/optimize/{run}/{task}/{salt}/{name}"


@dataclass
class Workflow:
    """A Workflow whose run has tried every attempt; `spec` and `platform` are the two documents of the pipeline's file.

    With `defaults` the cluster has the `templateDefaults` of an installation of KFP 2.17.
    """

    spec: dict[str, Any]
    platform: dict[str, Any]
    defaults: bool = True
    nodes: dict[str, Any] = field(default_factory=dict)
    #: Pods that ran, drivers among them.
    pods: int = 0

    def __post_init__(self) -> None:
        self._settings = self.platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
        self._run = _salt("run")
        self._dag("root", "root")

    @property
    def submitted(self) -> int:
        """Bytes of the Workflow when it is submitted: the arguments, and a template for each graph."""
        return FIXED + len(_json(list(self._arguments()))) + len(_json(list(self._templates())))

    @property
    def finished(self) -> int:
        """Bytes of the Workflow at the end of its run, the status of its nodes compressed."""
        status = base64.b64encode(gzip.compress(_json(dict(sorted(self.nodes.items()))).encode(), mtime=0))
        completed = {key: True for key, node in self.nodes.items() if node["type"] == "Pod"}
        return self.submitted + len(status) + len(_json(completed))

    def _parts(self, component: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """A component's interface, its container, and its settings for Kubernetes; empty where it has none."""
        body = self.spec["root"] if component == "root" else self.spec["components"][component]
        label = body.get("executorLabel")
        container = self.spec["deploymentSpec"]["executors"][label]["container"] if label else {}
        return body, container, self._settings.get("executors", {}).get(label, {})

    def _arguments(self) -> Iterator[dict[str, str]]:
        seen = set()
        for component in ("root", *self.spec["components"]):
            body, container, settings = self._parts(component)
            shared = _digest(_json(container)) if container else component
            values = {f"components-{shared}": body, f"implementations-{shared}": container}
            for name, value in {**values, f"kubernetes-{component}": settings}.items():
                if value and name not in seen:
                    seen.add(name)
                    yield {"name": name, "value": _json(value)}

    def _templates(self) -> Iterator[dict[str, Any]]:
        for component in ("root", *self.spec["components"]):
            body, _, _ = self._parts(component)
            if "dag" in body:
                tasks = [part for name, task in body["dag"]["tasks"].items() for part in self._tasks(name, task)]
                inputs = {"parameters": [{"name": "parent-dag-id"}]}
                yield {"name": component, "inputs": inputs, "outputs": {}, "metadata": {}, "dag": {"tasks": tasks}}

    def _tasks(self, name: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A task of a graph's template: its driver, and its graph or its executor."""
        component = task["componentRef"]["name"]
        _, container, settings = self._parts(component)
        shared = _digest(_json(container)) if container else component
        given = {
            "component": f"{{{{workflow.parameters.components-{shared}}}}}",
            "task": _json(task),
            "task-name": name,
            "parent-dag-id": "{{inputs.parameters.parent-dag-id}}",
        }
        says = f"{{{{tasks.{name}-driver.outputs.parameters."
        then = {"parent-dag-id": f"{says}execution-id}}}}", "condition": f"{says}condition}}}}"}
        if container:
            given["container"] = f"{{{{workflow.parameters.implementations-{shared}}}}}"
            given |= {"kubernetes-config": f"{{{{workflow.parameters.kubernetes-{component}}}}}"} if settings else {}
            then = {"pod-spec-patch": f"{says}pod-spec-patch}}}}", "cached-decision": f"{says}cached-decision}}}}"}
            then |= _labels(settings) | _retries(task)
        before = " && ".join(f"{other}.Succeeded" for other in task.get("dependentTasks", []))
        driver = "system-container-driver" if container else "system-dag-driver"
        yield {"name": f"{name}-driver", "template": driver, "arguments": _parameters(given), "depends": before}
        used = "metadata-0-1-retry-system-container-executor" if container else component
        done = {"arguments": _parameters(then), "depends": f"{name}-driver.Succeeded"}
        yield {"name": name, "template": used, **done}

    def _dag(self, component: str, path: str) -> None:
        """Adds the nodes of a graph's tasks, every attempt tried, so that of two branches the first is taken."""
        body, _, _ = self._parts(component)
        skipped = False
        for name, task in body["dag"]["tasks"].items():
            below = task["componentRef"]["name"]
            inner, container, settings = self._parts(below)
            place = f"{path}.{name}"
            given = {"component": _json(inner), "task": _json(task), "task-name": name, "parent-dag-id": _number(path)}
            if container:
                given |= {"container": _json(container), "kubernetes-config": _json(settings) if settings else ""}
                patch = self._patch(place, name, task)
                says = {"pod-spec-patch": patch, "cached-decision": "false", "condition": "nil"}
                self._add(f"{place}-driver", "Pod", given, says)
                then = {"pod-spec-patch": patch, "cached-decision": "false", **_labels(settings), **_retries(task)}
                self._add(place, "DAG", then)
                then.pop("cached-decision")
                self._add(f"{place}.executor", "Pod", then, retried="retryPolicy" in task)
                continue
            condition = task.get("triggerPolicy", {}).get("condition", "")
            says = {"execution-id": _number(place), "iteration-count": "0", "condition": str(not skipped).lower()}
            self._add(f"{place}-driver", "Pod", given, says)
            if condition and (skipped or "rolled_back" in condition):
                self._add(place, "Skipped", {}, retried=False)
                continue
            skipped = skipped or bool(condition)
            self._add(place, "DAG", {"parent-dag-id": _number(place), "condition": "true"})
            self._dag(below, place)

    def _add(
        self, path: str, kind: str, inputs: dict[str, str], outputs: dict[str, str] | None = None, retried: bool = False
    ) -> None:
        self.pods += kind == "Pod"
        again = retried or (self.defaults and kind != "Skipped")
        for name, type_ in ((path, "Retry"), (f"{path}(0)", kind)) if again else ((path, kind),):
            key = f"optimize-x7k2p-{int(_digest(name)[:8], 16)}"
            self.nodes[key] = {
                "id": key,
                "name": f"optimize-x7k2p.{name}",
                "displayName": name.rpartition(".")[2],
                "type": type_,
                "templateName": "metadata-0-1-retry-system-container-executor",
                "templateScope": "local/optimize-x7k2p",
                "phase": "Skipped" if kind == "Skipped" else "Succeeded",
                "boundaryID": f"optimize-x7k2p-{int(_digest(path.rpartition('.')[0])[:8], 16)}",
                "startedAt": f"2026-11-29T{int(_digest(name)[8:10], 16) % 24:02d}:{len(self.nodes) % 60:02d}:17Z",
                "finishedAt": f"2026-11-29T{int(_digest(name)[10:12], 16) % 24:02d}:{len(self.nodes) % 60:02d}:43Z",
                "progress": "1/1",
                "resourcesDuration": {"cpu": len(self.nodes), "memory": 3 * len(self.nodes)},
                "inputs": _parameters(inputs),
                "outputs": {**_parameters(outputs or {}), "exitCode": "0"},
                "children": [f"optimize-x7k2p-{int(_digest(name)[12:20], 16)}"],
                "hostNodeName": "gpu-node-1.internal",
            }

    def _patch(self, path: str, name: str, task: dict[str, Any]) -> str:
        """The patch of a pod that a driver returns."""
        body, container, settings = self._parts(task["componentRef"]["name"])
        given = task.get("inputs", {})
        values = {key: STATE.format(_digest(path)) if key in URIS else "1" for key in given.get("parameters", {})}
        artifacts = {key: {"artifacts": [self._artifact(path, key, made=True)]} for key in given.get("artifacts", {})}
        outputs = body.get("outputDefinitions", {})
        files = {key: {"outputFile": f"/tmp/kfp/outputs/{key}"} for key in outputs.get("parameters", {})}
        made = {key: {"artifacts": [self._artifact(path, key)]} for key in outputs.get("artifacts", {})}
        execution = {
            "inputs": {"parameterValues": values, "artifacts": artifacts},
            "outputs": {"parameters": files, "artifacts": made, "outputFile": "/tmp/kfp_outputs/output_metadata.json"},
        }
        launch = ["/kfp-launcher/launch", "--pipeline_name", "optimize", "--run_id", self._run]
        launch += ["--execution_id", _number(path), "--executor_input", _json(execution)]
        launch += ["--component_spec", _json(body), "--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)"]
        launch += ["--mlmd_server_address", "metadata-grpc-service.kubeflow", "--mlmd_server_port", "8080", "--"]
        main = {
            "name": "main",
            "image": container["image"],
            "command": launch + container["command"],
            "args": container["args"],
            "env": container.get("env", []),
            "resources": {"limits": container.get("resources", {}), "requests": container.get("resources", {})},
        }
        return _json({"containers": [main], **settings})

    def _artifact(self, path: str, name: str, made: bool = False) -> dict[str, Any]:
        """An artifact; once it is made, with the metadata that `stages.describe_tree` writes."""
        digest = _digest(path + name)
        uri = ARTIFACT.format(run=self._run, task=path.rpartition(".")[2], salt=_salt(path + name), name=name)
        metadata = {"tree_uri": STATE.format(digest), "tree_digest": digest, "tree_bytes": 7_000_000_000}
        metadata |= {"framework": "transformers", "model_format_name": "safetensors", "model_format_version": "1"}
        metadata |= {"quantization": "int4_awq", "bits": 4}
        kind = {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"}
        return {"name": _number(digest), "type": kind, "uri": uri, **({"metadata": metadata} if made else {})}


def _labels(settings: dict[str, Any]) -> dict[str, str]:
    labels = settings.get("podMetadata", {}).get("labels", {})
    found = {}
    for key, value in labels.items():
        found |= {"pod-metadata-label-key": key, "pod-metadata-label-val": value}
    return found


def _retries(task: dict[str, Any]) -> dict[str, str]:
    policy = task.get("retryPolicy", {})
    return {f"retry-{name}": str(value) for name, value in policy.items()}


def _parameters(values: dict[str, str]) -> dict[str, Any]:
    return {"parameters": [{"name": name, "value": value} for name, value in values.items()]}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _number(text: str) -> str:
    return str(int(_digest(text)[:5], 16))


def _salt(text: str) -> str:
    found = _digest(text)
    return f"{found[:8]}-{found[8:12]}-{found[12:16]}-{found[16:20]}-{found[20:32]}"
