"""The profile of a cluster: where the stages of a run find GPUs, memory, credentials and a cache. YAML, as a recipe is.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from trimtab.base.errors import nearest
from trimtab.base.signing import KEY, VALIDATION_KEY, public_key
from trimtab.base.user_document import UserDocument
from trimtab.recipe.cost import Prices
from trimtab.stages import TASKS

#: The tasks that a profile places one by one: those that do work on a model, by their names in a run.
PLACED = ("fetch", *TASKS, "validate")

#: Those that load a built engine.
ENGINE_TASKS = ("engine", "validate")

#: What a value in the clear must not be.
SECRET = re.compile(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY|CREDENTIAL)", re.IGNORECASE)


def _matching(pattern: str, problem: str) -> AfterValidator:
    """A check that a value is as a pattern says, or the problem with it."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(problem)
        return value

    return AfterValidator(check)


def _image(value: str) -> str:
    name, _, digest = value.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        raise ValueError("has no tag that stays; write name:version or name@sha256:…")
    return value


Quantity = Annotated[
    str,
    _matching(
        r"[1-9]\d*(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T|m)?", "is not a Kubernetes quantity; write such as '4', '500m' or '16Gi'"
    ),
]
Name = Annotated[
    str,
    _matching(
        r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?",
        "is not a name of Kubernetes; write lower case letters, digits, '-' and '.'",
    ),
]
LabelKey = Annotated[
    str,
    _matching(
        r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?",
        "is not a label's key; write such as 'team' or 'example.com/team'",
    ),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
Variable = Annotated[
    str,
    _matching(r"[A-Za-z_][A-Za-z0-9_]*", "is not the name of an environment variable; write such as AWS_REGION"),
]
ImageName = Annotated[str, AfterValidator(_image)]


class Toleration(UserDocument):
    """A taint of nodes that pods tolerate, as Kubernetes has it."""

    key: LabelKey | None = None
    """The taint's key; every key if absent, with operator Exists alone."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Equal asks for the value, Exists for none."""
    value: str | None = None
    """The taint's value, with operator Equal; none if absent."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; every effect if absent."""

    @model_validator(mode="after")
    def _value_where_it_means_something(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("has operator Exists and a value; remove the value, or write operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("has operator Equal and no key; write the key, or operator: Exists")
        return self


class Gpu(UserDocument):
    """Where stages run that need an accelerator."""

    resource: LabelKey = "nvidia.com/gpu"
    """The name under which Kubernetes counts accelerators."""
    node_selector: dict[LabelKey, LabelValue] = {}
    """Labels of the nodes to run on; they hold only while a stage asks for an accelerator."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes that the stages tolerate."""


class Images(UserDocument):
    """The container images of the stages, each with a tag that stays or a digest."""

    cpu: ImageName | None = None
    """Runs all that needs no GPU, the small tasks between the stages among it; that of `--image` or TRIMTAB_IMAGE if
    absent."""
    cuda: ImageName | None = None
    """Runs the stages of an attempt; the pipeline's own image if absent."""
    engine: ImageName | None = None
    """Runs those stages that build and judge engines, such as an image that holds TensorRT-LLM; `cuda` if absent."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets that open the registry."""

    def of(self, task: str) -> str | None:
        """Returns the image of a task that works on a model; None for the pipeline's own."""
        return (self.engine if task in ENGINE_TASKS else None) or self.cuda


class Cache(UserDocument):
    """A volume that keeps what was read of the store between pods."""

    claim: Name
    """The persistent volume claim: ReadWriteMany, or all stages of all runs land on one node."""
    path: Annotated[str, StringConstraints(pattern=r"^/[^\s:]+$")] = "/cache"
    """Where it is mounted."""


class ValidationSigning(UserDocument):
    """The secret that validation signs its answers with, and that reaches no other task."""

    secret: Name
    """The secret's name."""
    key: str = "key"
    """The entry of the secret that holds the private key, PEM."""
    password: str | None = None
    """The entry of the secret that holds the key's password; the key has none if absent."""
    public: str
    """The public half of the key, the text of PEM: the gate releases nothing whose answers are not signed with it."""

    @field_validator("public")
    @classmethod
    def _is_public(cls, value: str) -> str:
        if "-----BEGIN" not in value:
            raise ValueError("is not a public key in PEM; write the text of the .pub of `trimtab keygen`")
        public_key(value)
        return value


class Signing(UserDocument):
    """The secret that the deploy gate signs releases with, and that reaches no other task."""

    secret: Name
    """The secret's name."""
    key: str = "key"
    """The entry of the secret that holds the private key, PEM."""
    password: str | None = None
    """The entry of the secret that holds the key's password; the key has none if absent."""
    validation: ValidationSigning | None = None
    """The key that validation signs its answers with; if absent, whoever writes to the store could file others."""


class Authority(UserDocument):
    """The certificates of a site's own authority, which signs its proxy, its store or its hub."""

    config_map: Name
    """The ConfigMap that holds them."""
    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")] = "ca.crt"
    """The entry that holds them, PEM: all that are trusted, public authorities among them where they are needed."""

    @property
    def path(self) -> str:
        """Where every stage finds the file."""
        return f"/etc/trimtab/authority/{self.key}"


class StageLimits(UserDocument):
    """What one stage may take; what is absent is not limited. Requests equal limits, so that nothing is evicted."""

    cpu: Quantity | None = None
    """CPUs, as Kubernetes counts them: "4" or "500m"."""
    memory: Quantity | None = None
    """Memory, as Kubernetes counts it: 16Gi; if absent, as much as a stage is forecast to need is asked for."""
    timeout_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after which the stage is ended."""
    retries: Annotated[int, Field(ge=0, le=10)] | None = None
    """How often a stage whose pod was lost is begun anew; what passes is waited for without that."""


class Profile(UserDocument):
    """What a cluster offers the stages of a run.

    How many accelerators a stage gets is no part of it: the recipe says so, and `prepare` asks for none where a stage
    has nothing to do.

    Example::

        gpu:
          node_selector: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}
          tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
        images:
          cpu: registry.example/trimtab-cpu-python:0.1.0
          cuda: registry.example/trimtab-cuda:0.1.0
          pull_secrets: [registry]
        secrets: {trimtab-s3: {access_key: AWS_ACCESS_KEY_ID, secret_key: AWS_SECRET_ACCESS_KEY}}
        environment: {AWS_ENDPOINT_URL: "http://seaweedfs.kubeflow:8333"}
        cache: {claim: trimtab-cache}
        shared_memory: 16Gi
        stage: {memory: 16Gi, cpu: "4", timeout_hours: 12, retries: 2}
        prices: {gpu_hour: 2.5, cpu_hour: 0.04}
        stages: {distill: {memory: 64Gi, timeout_hours: 48}}
    """

    gpu: Gpu = Gpu()
    """Where stages run that need an accelerator."""
    images: Images = Images()
    """The container images of the stages."""
    environment: dict[Variable, str] = {}
    """Environment variables of every stage, none of them a secret: {NAME: value}."""
    secrets: dict[Name, dict[str, Variable]] = {}
    """Secrets of Kubernetes that reach every stage: {secret: {its entry: environment variable}}."""
    gate_secrets: dict[Name, dict[str, Variable]] = {}
    """Secrets that reach the deploy gate in place of `secrets`: with them it alone may write releases; `secrets` if
    absent."""
    signing: Signing | None = None
    """The secret that releases are signed with; they are not signed if absent."""
    authority: Authority | None = None
    """Certificates to trust beyond those of the images; none if absent."""
    queue: Name | None = None
    """The LocalQueue of Kueue that the stages of an attempt wait in, each by itself; none if absent."""
    cache: Cache | None = None
    """A volume that keeps what was read of the store between pods; each pod reads anew if absent."""
    shared_memory: Quantity | None = None
    """The size of /dev/shm for stages with a GPU, which data loaders and NCCL need: 16Gi; a container's own 64 MiB if
    absent."""
    labels: dict[LabelKey, LabelValue] = {}
    """Labels of every pod."""
    prices: Prices | None = None
    """What an hour of a GPU or a core costs; the ledger of a run has hours alone if absent."""
    stage: StageLimits = StageLimits()
    """What each stage may take."""
    stages: dict[str, StageLimits] = {}
    """What single stages may take, by name, where it is something else than `stage` says."""

    @field_validator("environment")
    @classmethod
    def _nothing_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if SECRET.search(name):
                raise ValueError(f"has {name}, which anyone who sees the pipeline could read; name it in secrets")
        return value

    @field_validator("secrets", "gate_secrets")
    @classmethod
    def _signing_is_the_gate_s(cls, value: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        for secret, variables in value.items():
            if KEY in variables.values():
                raise ValueError(f"has {KEY}, which every task would see; write signing: {{secret: {secret}, key: …}}")
            if VALIDATION_KEY in variables.values():
                raise ValueError(f"has {VALIDATION_KEY}, which every task would see; write signing: {{validation: …}}")
        return value

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, value: dict[str, StageLimits]) -> dict[str, StageLimits]:
        for name in value:
            if name not in PLACED:
                raise ValueError(f"has no stage '{name}'; {nearest(name, PLACED)}")
        return value

    def limits(self, task: str) -> StageLimits:
        """Returns what a task may take: its own entry of `stages`, and `stage` for what that leaves open."""
        own = self.stages.get(task, StageLimits()).model_dump(exclude_none=True)
        return self.stage.model_copy(update=own)
