"""Puts a profile's settings on the tasks of the pipeline, by KFP's Kubernetes extension."""

from __future__ import annotations

from kfp import dsl, kubernetes

from trimtab.base import signing
from trimtab.stages.profile import Profile


def place(
    task: dsl.PipelineTask, name: str, profile: Profile, accelerators: object = None, nodes: object = None
) -> dsl.PipelineTask:
    """Sets what the profile says of a task that works on a model; a profile without fields changes nothing.

    Args:
        task: the task, inside the pipeline that owns it.
        name: one of `trimtab.stages.profile.PLACED`.
        profile: the cluster's.
        accelerators: how many, an output of `prepare`; None for a task that never needs one.
        nodes: the selector to use at run time, an output of `prepare`; None likewise.
    """
    limits = profile.limits(name)
    if limits.cpu:
        task.set_cpu_request(limits.cpu).set_cpu_limit(limits.cpu)
    if limits.memory:
        task.set_memory_request(limits.memory).set_memory_limit(limits.memory)
    if limits.retries:
        task.set_retry(limits.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
    if limits.timeout_hours:
        kubernetes.set_timeout(task, int(limits.timeout_hours * 3600))
    reach(task, profile)
    if name == "validate" and profile.signing and (validation := profile.signing.validation):
        variables = {validation.key: signing.VALIDATION_KEY}
        if validation.password:
            variables[validation.password] = signing.VALIDATION_PASSWORD
        kubernetes.use_secret_as_env(task, validation.secret, variables)
    if accelerators is not None:
        _accelerate(task, name, profile, accelerators, nodes)
    return task


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


def _accelerate(task: dsl.PipelineTask, name: str, profile: Profile, accelerators: object, nodes: object) -> None:
    task.set_accelerator_type(profile.gpu.resource).set_accelerator_limit(accelerators)
    if image := profile.images.of(name):
        task.set_container_image(image)
    if profile.gpu.node_selector:
        kubernetes.add_node_selector_json(task, nodes)
    for toleration in profile.gpu.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    if profile.shared_memory:
        # A container's own /dev/shm has 64 MiB, which data loaders and NCCL outgrow.
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)
