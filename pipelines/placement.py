"""Puts a profile's settings on the tasks of the pipeline, by KFP's Kubernetes extension."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kfp import dsl, kubernetes

from trimtab.base import signing
from trimtab.components import images
from trimtab.stages import OPTIONAL
from trimtab.stages.profile import ENGINE_TASKS, Profile, StageLimits

#: The label by which Kueue holds a pod back until its queue has room: kueue.sigs.k8s.io, "Run Plain Pods".
QUEUE = "kueue.x-k8s.io/queue-name"
#: Where Python's ssl, requests and the clients of S3 look for the certificates to trust.
TRUST = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
#: Seconds before the first retry of a pod; before each further one twice as many.
PAUSE = 30
#: What all tries of a stage without a time limit may take, in hours: a month.
UNLIMITED_HOURS = 720


def place(
    task: dsl.PipelineTask, name: str, profile: Profile, need: Mapping[str, object] | None = None
) -> dsl.PipelineTask:
    """Sets what the profile says of a task that works on a model; a profile without fields changes nothing.

    Args:
        task: the task, inside the pipeline that owns it.
        name: one of `trimtab.stages.profile.PLACED`.
        profile: the cluster's.
        need: the outputs of `prepare`, which say while the run goes on what the task needs; None for a task that never
            needs an accelerator, and always as much of the rest.
    """
    limits = profile.limits(name)
    said = need if need and name in OPTIONAL else {}
    if limits.cpu:
        cpu = said.get(f"{name}_cpu", limits.cpu)
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
    if limits.memory:
        memory = said.get(f"{name}_memory", limits.memory)
        task.set_memory_request(memory).set_memory_limit(memory)
    elif said:  # a forecast is asked for, and kills nothing
        task.set_memory_request(said[f"{name}_memory"])
    if limits.retries:
        longest = f"{_seconds_of_all_tries(limits)}s"
        task.set_retry(limits.retries, f"{PAUSE}s", backoff_factor=2, backoff_max_duration=longest)
    if limits.timeout_hours:
        kubernetes.set_timeout(task, int(limits.timeout_hours * 3600))
    reach(task, profile)
    if profile.queue and need:
        kubernetes.add_pod_label(task, QUEUE, profile.queue)
    if name == "validate" and profile.signing and (validation := profile.signing.validation):
        variables = {validation.key: signing.VALIDATION_KEY}
        if validation.password:
            variables[validation.password] = signing.VALIDATION_PASSWORD
        kubernetes.use_secret_as_env(task, validation.secret, variables)
    if need:
        _accelerate(task, name, profile, need)
    return task


def machines(profile: Profile, image: str = "") -> dict[str, object]:
    """Returns what the cluster has for the tasks of an attempt, as `trimtab.stages.machines` wants it; and what the
    others of them ask for, by which `cluster.capacity` compares with what the namespace allows.

    Args:
        image: the container image of tasks for which the profile names none; "" for that of this version.
    """
    small = image or images.CPU
    tasks = {}
    for name in OPTIONAL:
        limits = profile.limits(name)
        tasks[name] = {
            "cpu": limits.cpu or "",
            "memory": limits.memory or "",
            "image": profile.images.of(name) or small,
        }
    always = {}
    for name in ENGINE_TASKS:
        limits = profile.limits(name)
        always[name] = {"cpu": limits.cpu or "", "memory": limits.memory or ""}
    offered = {"nodes": profile.gpu.node_selector, "tolerations": _tolerations(profile)}
    return {**offered, "small": small, "tasks": tasks, "always": always, "resource": profile.gpu.resource}


def _tolerations(profile: Profile) -> list[dict[str, str]]:
    return [toleration.model_dump(exclude_none=True) for toleration in profile.gpu.tolerations]


def _seconds_of_all_tries(limits: StageLimits) -> int:
    """How long a stage with all its retries may take. Argo counts from the first start, ends a try that is under way
    then, and begins no other."""
    hours = limits.timeout_hours * (limits.retries + 1) if limits.timeout_hours else UNLIMITED_HOURS
    return math.ceil(hours * 3600) + PAUSE * 2**limits.retries


def reach(task: dsl.PipelineTask, profile: Profile, is_gate: bool = False) -> dsl.PipelineTask:
    """Gives a task what it needs to reach the store: environment, credentials, cache, and its labels.

    The deploy gate has credentials of its own where the profile names some.
    """
    for variable, value in profile.environment.items():
        task.set_env_variable(variable, value)
    for secret, variables in (profile.gate_secrets if is_gate and profile.gate_secrets else profile.secrets).items():
        kubernetes.use_secret_as_env(task, secret, variables)
    if profile.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.images.pull_secrets))
    if profile.authority:
        place_of = profile.authority.path.rpartition("/")[0]
        kubernetes.use_config_map_as_volume(task, profile.authority.config_map, mount_path=place_of)
        for variable in TRUST:
            task.set_env_variable(variable, profile.authority.path)
    if profile.cache:
        kubernetes.mount_pvc(task, profile.cache.claim, profile.cache.path)
        task.set_env_variable("TRIMTAB_CACHE", profile.cache.path)
    for key, value in profile.labels.items():
        kubernetes.add_pod_label(task, key, value)
    return task


def sign(task: dsl.PipelineTask, profile: Profile) -> dsl.PipelineTask:
    """Gives the deploy gate the key of its releases, and has it release nothing that it could not sign."""
    if profile.signing:
        variables = {profile.signing.key: signing.KEY}
        if profile.signing.password:
            variables[profile.signing.password] = signing.PASSWORD
        kubernetes.use_secret_as_env(task, profile.signing.secret, variables)
        task.set_env_variable(signing.REQUIRED, "1")
        if profile.signing.validation:
            task.set_env_variable(signing.VALIDATION_PUBLIC, profile.signing.validation.public)
    return task


def _accelerate(task: dsl.PipelineTask, name: str, profile: Profile, need: Mapping[str, object]) -> None:
    task.set_accelerator_type(profile.gpu.resource).set_accelerator_limit(need[name])
    if image := profile.images.of(name):
        task.set_container_image(need[f"{name}_image"] if name in OPTIONAL else image)
    if profile.gpu.node_selector:
        kubernetes.add_node_selector_json(task, need[f"{name}_nodes"])
    if profile.gpu.tolerations and name in OPTIONAL:
        kubernetes.add_toleration_json(task, need[f"{name}_tolerations"])
    elif profile.gpu.tolerations:
        kubernetes.add_toleration_json(task, _tolerations(profile))
    if profile.shared_memory:
        # A container's own /dev/shm has 64 MiB, which data loaders and NCCL outgrow.
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)
