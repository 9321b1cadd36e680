"""Brings a release to a cluster: a canary beside the version that serves, compared, then promoted or rolled back.

Whatever happens after the canary was applied, a refusal, an error or Ctrl-C, takes its traffic away again. What a
killed process leaves behind is a canary with its share, which the next rollout of the same release takes up.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import Any

import yaml

from trimtab import progress
from trimtab.components.deployment import comparison
from trimtab.components.deployment.cluster import Cluster
from trimtab.components.deployment.serving import APPROVED, ARTIFACT, Rollout, inference_service
from trimtab.errors import InputError, NotReleased, StageError

POLL_SECONDS = 5.0
#: What Kubernetes and KServe write into an object, which is no difference.
BOOKKEEPING = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")


def difference(cluster: Cluster, rollout: Rollout, store: str, digest: str, force: bool = False) -> str:
    """Returns what a rollout would change, as the cluster itself would apply it: a unified diff, "" for nothing."""
    before = cluster.read(rollout.service)
    wanted = inference_service(rollout, store, digest, canary=_serving(before) is not None)
    after = cluster.apply(wanted, force=force, dry=True)
    lines = difflib.unified_diff(_lines(before), _lines(after), "in the cluster", "after the rollout", lineterm="")
    return "\n".join(lines)


def roll_out(
    cluster: Cluster, rollout: Rollout, store: str, digest: str, force: bool = False, poll: float = POLL_SECONDS
) -> str:
    """Rolls an artifact out and returns a sentence of how it went.

    Raises:
        NotReleased: the new version is not ready in time, answers wrongly or late, or was not approved; the version
            before it serves.
        InputError: someone else's rollout is under way, or the service cannot have a canary.
    """
    before = cluster.read(rollout.service)
    old = _serving(before)
    share = _canary_percent(before)
    if old and share is None and _ready(before) and _unchanged(cluster, before, rollout, store, digest, force):
        return f"{rollout.service} serves this release already"
    if share and _annotation(before, ARTIFACT) != digest:
        raise InputError(f"service: a rollout to '{rollout.service}' is under way ({share} %); wait for it, or end it")
    if before and old is None:
        raise InputError(
            f"service: '{rollout.service}' has no version that a canary could stand beside (KServe without Knative, or "
            "it was never ready); write another service, or delete this one"
        )
    wanted = inference_service(rollout, store, digest, canary=old is not None)
    cluster.apply(wanted, force=force, dry=True)  # what the cluster refuses, it refuses before anything has changed
    try:
        cluster.apply(wanted, force=force)
        beside = f"with {rollout.canary_percent} % of the traffic" if old else "as the first version"
        progress.report("rollout", f"{rollout.service}: applied {beside}")
        ready = _until_ready(cluster, rollout, old, poll)
        _compare(ready, rollout, old)
        if rollout.approval_minutes:
            _until_approved(cluster, rollout, digest, poll)
        if old:
            cluster.apply(inference_service(rollout, store, digest, canary=False), force=force)
            _until(cluster, rollout, poll, rollout.ready_minutes, _promoted(ready), "does not take over")
    except BaseException:
        _roll_back(cluster, rollout, store, digest, old)
        raise
    return f"{rollout.service} serves {digest[:12]}"


def _unchanged(
    cluster: Cluster, before: dict[str, Any], rollout: Rollout, store: str, digest: str, force: bool
) -> bool:
    """Whether applying would change nothing, as the cluster itself says: its defaults are no change."""
    after = cluster.apply(inference_service(rollout, store, digest, canary=False), force=force, dry=True)
    return after["spec"] == before["spec"]


def _roll_back(cluster: Cluster, rollout: Rollout, store: str, digest: str, old: str | None) -> None:
    """Gives the traffic back to the version before; a service that had none is deleted, one that is gone stays so."""
    if cluster.read(rollout.service) is None:
        return
    if old is None:
        cluster.delete(rollout.service)
        progress.report("rollout", f"{rollout.service}: deleted, it had no version before")
        return
    service = inference_service(rollout, store, digest, canary=True)
    service["spec"]["predictor"]["canaryTrafficPercent"] = 0
    cluster.apply(service, force=True)  # the canary was ours a moment ago
    progress.report("rollout", f"{rollout.service}: rolled back, {old} serves")


def _until_ready(cluster: Cluster, rollout: Rollout, old: str | None, poll: float) -> dict[str, Any]:
    """Waits until the new revision is ready and, beside an old one, has an address of its own."""

    def reached(service: dict[str, Any]) -> bool:
        predictor = _predictor(service)
        latest = predictor.get("latestReadyRevision")
        fresh = latest and latest == predictor.get("latestCreatedRevision") and latest != old
        return bool(_ready(service) and fresh and (old is None or _url(service, latest)))

    return _until(cluster, rollout, poll, rollout.ready_minutes, reached, "is not ready")


def _promoted(ready: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    latest = _predictor(ready)["latestReadyRevision"]
    return lambda service: bool(_ready(service) and _predictor(service).get("latestRolledoutRevision") == latest)


def _until_approved(cluster: Cluster, rollout: Rollout, digest: str, poll: float) -> None:
    command = (
        f"kubectl -n {rollout.namespace} annotate --overwrite inferenceservice {rollout.service} {APPROVED}={digest}"
    )
    progress.report("rollout", f"waits for approval: {command}")
    _until(
        cluster,
        rollout,
        poll,
        rollout.approval_minutes,
        lambda service: _annotation(service, APPROVED) == digest,
        "is not approved",
    )


def _until(
    cluster: Cluster,
    rollout: Rollout,
    poll: float,
    minutes: float,
    reached: Callable[[dict[str, Any]], bool],
    otherwise: str,
) -> dict[str, Any]:
    end = time.monotonic() + 60 * minutes
    while True:
        service = cluster.read(rollout.service)
        if service is None:
            raise StageError(f"service: '{rollout.service}' was deleted while it was rolled out")
        if reached(service):
            return service
        if time.monotonic() + poll > end:
            said = _why_not_ready(service)
            raise NotReleased(f"the new version of {rollout.service} {otherwise} within {minutes:g} minutes{said}")
        time.sleep(poll)


def _compare(service: dict[str, Any], rollout: Rollout, old: str | None) -> None:
    """Asks the new version, and the old one where there is one; raises when the new one must not take over."""
    latest = _predictor(service)["latestReadyRevision"]
    url = _url(service, latest) if old else service["status"].get("url", "")
    new = comparison.ask(url, rollout.service, rollout.prompts, rollout.max_tokens)
    before = comparison.ask(_url(service, old), rollout.service, rollout.prompts, rollout.max_tokens) if old else None
    refusal = comparison.refusal(new, before, rollout.max_disagreement, rollout.max_latency_seconds)
    if refusal:
        raise NotReleased(f"{rollout.service}: {refusal}")
    progress.report("rollout", f"{rollout.service}: {len(rollout.prompts)} prompts answered as they should be")


def _predictor(service: dict[str, Any] | None) -> dict[str, Any]:
    return (((service or {}).get("status") or {}).get("components") or {}).get("predictor") or {}


def _serving(service: dict[str, Any] | None) -> str | None:
    """The revision that serves; a canary that lost its traffic is none."""
    predictor = _predictor(service)
    return predictor.get("latestRolledoutRevision") or None


def _url(service: dict[str, Any], revision: str | None) -> str:
    """The address of one revision, "" while it has none."""
    for target in _predictor(service).get("traffic") or ():
        if target.get("revisionName") == revision and target.get("url"):
            return target["url"]
    return ""


def _canary_percent(service: dict[str, Any] | None) -> int | None:
    return (((service or {}).get("spec") or {}).get("predictor") or {}).get("canaryTrafficPercent")


def _annotation(service: dict[str, Any] | None, name: str) -> str | None:
    return ((service or {}).get("metadata", {}).get("annotations") or {}).get(name)


def _ready(service: dict[str, Any]) -> bool:
    """Whether the status is of the object as it is now, and good."""
    status = service.get("status") or {}
    current = status.get("observedGeneration", 0) >= service["metadata"].get("generation", 0)
    return current and any(
        item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions") or ()
    )


def _why_not_ready(service: dict[str, Any]) -> str:
    for item in (service.get("status") or {}).get("conditions") or ():
        if item["status"] != "True" and item.get("message"):
            return f": {' '.join(item['message'].split())[:300]}"
    return ""


def _lines(service: dict[str, Any] | None) -> list[str]:
    if service is None:
        return []
    metadata = {name: value for name, value in service["metadata"].items() if name not in BOOKKEEPING}
    shown = {**service, "metadata": metadata}
    shown.pop("status", None)
    return yaml.safe_dump(shown, sort_keys=True).splitlines()
