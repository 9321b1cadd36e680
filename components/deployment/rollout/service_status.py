"""What an InferenceService says of itself: which revision serves, whether it is ready, and its lines for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

#: What Kubernetes and KServe write into an object, which is no difference.
BOOKKEEPING = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")


def promoted(ready: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    """Returns what says of the service later on whether its latest revision has all traffic."""
    latest = status(ready)["latestReadyRevision"]
    return lambda service: bool(is_ready(service) and status(service).get("latestRolledoutRevision") == latest)


def status(service: dict[str, Any] | None) -> dict[str, Any]:
    """What KServe reports of its revisions and their traffic."""
    return (((service or {}).get("status") or {}).get("components") or {}).get("predictor") or {}


def serving_revision(service: dict[str, Any] | None) -> str | None:
    """The revision that serves; a canary that lost its traffic is none."""
    predictor = status(service)
    return predictor.get("latestRolledoutRevision") or None


def url(service: dict[str, Any], revision: str | None) -> str:
    """The address of one revision, "" while it has none."""
    for target in status(service).get("traffic") or ():
        if target.get("revisionName") == revision and target.get("url"):
            return target["url"]
    return ""


def canary_percent(service: dict[str, Any] | None) -> int | None:
    return (((service or {}).get("spec") or {}).get("predictor") or {}).get("canaryTrafficPercent")


def annotation(service: dict[str, Any] | None, name: str) -> str | None:
    return ((service or {}).get("metadata", {}).get("annotations") or {}).get(name)


def template(service: dict[str, Any] | None) -> Any:
    """What KServe makes a revision of: another one where this differs."""
    predictor = ((service or {}).get("spec") or {}).get("predictor") or {}
    template = {name: part for name, part in predictor.items() if name != "canaryTrafficPercent"}
    return template, (service or {}).get("metadata", {}).get("annotations")


def is_settled(service: dict[str, Any]) -> bool:
    """Whether one revision is the latest, ready and alone."""
    predictor = status(service)
    names = ("latestCreatedRevision", "latestReadyRevision", "latestRolledoutRevision")
    return is_ready(service) and len({predictor.get(name) for name in names}) == 1


def is_ready(service: dict[str, Any]) -> bool:
    return any(
        item["type"] == "Ready" and item["status"] == "True"
        for item in (service.get("status") or {}).get("conditions") or ()
    )


def why_not_ready(service: dict[str, Any]) -> str:
    for item in (service.get("status") or {}).get("conditions") or ():
        if item["status"] != "True" and item.get("message"):
            return f": {' '.join(item['message'].split())[:300]}"
    return ""


def lines(service: dict[str, Any] | None) -> list[str]:
    if service is None:
        return []
    metadata = {name: value for name, value in service["metadata"].items() if name not in BOOKKEEPING}
    shown = {**service, "metadata": metadata}
    shown.pop("status", None)
    return yaml.safe_dump(shown, sort_keys=True).splitlines()
