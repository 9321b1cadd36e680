"""What serves a release in a cluster: the settings of a rollout, and the InferenceService that they make."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from trimtab.base import labels, signing
from trimtab.base.errors import InputError
from trimtab.base.user_document import UserDocument
from trimtab.stages.profile import ImageName, LabelKey, LabelValue, Name, Quantity, Toleration, Variable

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
#: Says on the object which artifact it serves.
ARTIFACT = "trimtab/artifact"
MODEL_FOLDER = "/models/artifact"

PROMPTS = (
    "The capital of France is",
    "Water freezes at a temperature of",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "The opposite of hot is",
    "Dear customer, thank you for",
    "Seven times eight is",
    "The first president of the United States was",
)


class Rollout(UserDocument):
    """How a release is brought to a cluster: a canary beside what serves now, asked the same prompts at temperature 0.

    Example::

        service: assistant
        namespace: serving
        image: registry.example/vllm:0.12.0
        command: [vllm, serve, "{model}", --served-model-name, "{name}", --port, "8080"]
        loader: registry.example/trimtab-cpu-python:0.1.0
        resources: {cpu: "4", memory: 32Gi, nvidia.com/gpu: "1"}
        secrets: {trimtab-s3: {access_key: AWS_ACCESS_KEY_ID, secret_key: AWS_SECRET_ACCESS_KEY}}
        canary_percent: 10
        max_disagreement: 0.25
        max_latency_seconds: 2.0
        approval_minutes: 120
    """

    service: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
    """The name of the InferenceService."""
    namespace: Name
    """The namespace that it is in."""
    image: ImageName
    """The container image of the server, with a tag that stays or a digest."""
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Starts a server of OpenAI's completions API on `port`; {model} stands for the folder of the artifact and {name}
    for the service."""
    loader: ImageName
    """An image with trimtab, which brings the artifact out of the store."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """The port that the server listens on."""
    resources: dict[LabelKey, Quantity] = {"cpu": "4", "memory": "16Gi"}
    """What one copy of the server takes, requests and limits alike; cpu and memory at least."""
    node_selector: dict[LabelKey, LabelValue] = {}
    """Labels of the nodes to serve on; any node if absent."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes that the pods tolerate."""
    environment: dict[Variable, str] = {}
    """Environment variables of the loader, none of them a secret, such as the address of the store: {NAME: value}."""
    secrets: dict[Name, dict[str, Variable]] = {}
    """Secrets that the loader sees, such as those of the store: {secret: {its entry: environment variable}}."""
    canary_percent: Annotated[int, Field(ge=1, le=99)] = 10
    """The share of the traffic that the new version gets until it is promoted, in percent."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = PROMPTS
    """What both versions are asked, at temperature 0; eight short beginnings if absent."""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    """Tokens of each answer that are compared."""
    max_disagreement: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The share of the prompts that the new version may answer otherwise, at most."""
    max_latency_seconds: Annotated[float, Field(gt=0)] | None = None
    """The 95th percentile of the new version's latency, at most; it is not judged if absent."""
    ready_minutes: Annotated[float, Field(gt=0)] = 30
    """Minutes that the new version has to become ready."""
    approval_minutes: Annotated[float, Field(ge=0)] = 0
    """Minutes that a person has to approve the new version; 0 asks nobody."""
    keys: tuple[str, ...] = ()
    """Public keys, the text of PEM, of which one must have signed the release; its signature is not checked without
    any."""

    @field_validator("keys")
    @classmethod
    def _public(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for key in value:
            if "-----BEGIN" not in key:
                raise ValueError("is not a list of public keys in PEM; write the text of the .pub of `trimtab keygen`")
            signing.public_key(key)
        return value

    @field_validator("resources")
    @classmethod
    def _limited(cls, value: dict[str, str]) -> dict[str, str]:
        for name in ("cpu", "memory"):
            if name not in value:
                raise ValueError(f"has no {name}; write such as {name}: {'4' if name == 'cpu' else '16Gi'}")
        return value


def asked(text: str, store: str) -> Rollout | None:
    """Returns the rollout that a run is asked for, None for "".

    Args:
        text: a Rollout, YAML or JSON.
        store: URI of the run's store, which the pods of the service read.

    Raises:
        InputError: it is not valid, or no pod could read that store.
    """
    if not text.strip():
        return None
    rollout = Rollout.parse(text)
    if not store.startswith("s3://"):
        raise InputError(f"rollout: its pods cannot read the store '{store}'; write store: s3://bucket/prefix")
    return rollout


def inference_service(rollout: Rollout, store: str, digest: str, canary: bool) -> dict[str, Any]:
    """Returns the InferenceService that serves an artifact, with the canary's share of the traffic or all of it."""
    mounts = [{"name": "models", "mountPath": "/models"}]
    locked = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in rollout.environment.items()]
    for secret, keys in rollout.secrets.items():
        for key, variable in keys.items():
            variables.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    loader = {
        "name": "load",
        "image": rollout.loader,
        "command": ["trimtab", "artifact", "export", digest, MODEL_FOLDER, "--store", store],
        "env": variables,
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
        "securityContext": locked,
        "volumeMounts": [*mounts, {"name": "scratch", "mountPath": "/tmp"}],
    }
    named = {"{model}": f"{MODEL_FOLDER}/files", "{name}": rollout.service}
    server = {
        "name": "kserve-container",
        "image": rollout.image,
        "command": [_filled(part, named) for part in rollout.command],
        "ports": [{"containerPort": rollout.port, "protocol": "TCP"}],
        "resources": {"requests": dict(rollout.resources), "limits": dict(rollout.resources)},
        "securityContext": locked,
        "volumeMounts": [*mounts, {"name": "scratch", "mountPath": "/tmp"}],
    }
    predictor: dict[str, Any] = {
        "minReplicas": 1,
        "initContainers": [loader],
        "containers": [server],
        "volumes": [{"name": "models", "emptyDir": {}}, {"name": "scratch", "emptyDir": {}}],
    }
    if rollout.node_selector:
        predictor["nodeSelector"] = dict(rollout.node_selector)
    if rollout.tolerations:
        predictor["tolerations"] = [toleration.to_dict() for toleration in rollout.tolerations]
    if canary:
        predictor["canaryTrafficPercent"] = rollout.canary_percent
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "InferenceService",
        "metadata": {
            "name": rollout.service,
            "namespace": rollout.namespace,
            "labels": labels.recommended("server", name=rollout.service, version=digest[:12]),
            # Each version gets an address of its own, by which both are asked.
            "annotations": {ARTIFACT: digest, "serving.kserve.io/enable-tag-routing": "true"},
        },
        "spec": {"predictor": predictor},
    }


def _filled(part: str, named: dict[str, str]) -> str:
    for name, value in named.items():
        part = part.replace(name, value)
    return part
