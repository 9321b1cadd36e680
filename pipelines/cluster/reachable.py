"""Which of a run's inputs its pods can see: they have S3, the hub, their image and the volume that a profile mounts."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from trimtab.base.errors import InputError
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.recipe.workload import Recorded
from trimtab.stages.profile import Cache, Profile

#: Where clients of S3 find its server.
ENDPOINT = "AWS_ENDPOINT_URL"
#: What may stand in a field instead of a path; texts and tasks are not read from S3.
_ADDRESS = "s3://bucket/prefix"
_INSTEAD = {"model": f"{_ADDRESS}, a hub id org/name", "store": _ADDRESS, "workload.recorded": _ADDRESS}
_TEXT, _DATASET, _TASKS = "builtin", "hf:owner/name", "the names of lm-eval's own tasks alone"


def check(model: str, store: str, recipe: Recipe, evaluation: Evaluation, profile: Profile) -> None:
    """Refuses what is a path of this machine.

    Model, store and logs may lie on a volume that this machine has at the same place: any absolute path of theirs is
    taken. So is one of a text or of tasks that is not there on this machine: it may be one of the stages' image.

    Raises:
        InputError: names the field, and what to write instead with this profile.
    """
    _check_endpoint(store, profile)
    hub = model.count("/") == 1 and not model.startswith((".", "/")) and not Path(model).exists()
    addresses = {"store": store} if hub else {"model": model, "store": store}
    if isinstance(recipe.workload, Recorded):
        addresses["workload.recorded"] = recipe.workload.recorded
    for field, value in addresses.items():
        artifact = field == "model" and value.startswith("minio://")  # what the page of an earlier run shows
        if not artifact and not value.startswith(("s3://", "/")):
            _check(field, value, value, _INSTEAD[field], profile.cache)
    texts = [("heldout", evaluation.heldout)]
    texts += [("calibrate.text", source.text) for source in recipe.calibrate.sources]
    texts += [("distill.text", text) for text in recipe.distill.texts] if recipe.distill else []
    for field, text in texts:
        if text.startswith("hf:"):
            folder = text.removeprefix("hf:")
            if folder.startswith((".", "/")) or Path(folder).exists():
                _check(field, text, folder, _DATASET, profile.cache)
        elif text != "builtin":
            _check(field, text, text, _TEXT, profile.cache)
    if evaluation.task_path:
        _check("task_path", evaluation.task_path, evaluation.task_path, _TASKS, profile.cache)


def _check_endpoint(store: str, profile: Profile) -> None:
    """Refuses a store whose server pods would look for elsewhere than this machine does."""
    if not store.startswith("s3://"):
        return
    endpoint = profile.environment.get(ENDPOINT, "")
    host = urlsplit(endpoint).hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        raise InputError(
            f"profile: environment has {ENDPOINT}: {endpoint}, which to a pod is the pod itself; write the address of "
            f"the service, such as http://seaweedfs.kubeflow:8333"
        )
    here = os.environ.get(ENDPOINT, "")
    if here and not endpoint and profile.secrets:
        raise InputError(
            f"store: '{store}' is at {here} to this machine ({ENDPOINT}), and at AWS to the pods, for the profile does "
            f"not say; write environment: {{{ENDPOINT}: …}} into it, with an address that pods reach"
        )


def _check(field: str, value: str, path: str, instead: str, cache: Cache | None) -> None:
    place = PurePosixPath(path)
    mounted = cache is not None and place.is_relative_to(cache.path) and ".." not in place.parts
    if mounted or (place.is_absolute() and not Path(path).exists()):
        return
    here = "is of this machine, which the cluster does not see"
    why = "is not read from S3" if path.startswith("s3://") else here
    if cache:
        volume = f"the path of a copy below {cache.path}, the volume of the profile"
    else:
        volume = (
            "put a copy on a volume, name its claim in the profile (--profile FILE with cache: {claim: NAME}), and "
            "write the path of the copy, below /cache"
        )
    raise InputError(f"{field}: '{value}' {why}; write {instead}, or {volume}")
