"""A stand-in for the Kubernetes API with KServe, over real HTTP: InferenceServices, and the models behind them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from json_server import JsonServer


def status(code: int, reason: str, message: str, **details: str) -> tuple[int, dict[str, Any]]:
    """An error as the API answers it."""
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "details": details}


class KubernetesServer(JsonServer):
    """One service, as KServe on Knative keeps it: each change of what is served is a revision.

    `slow`: reads of the service until a new revision is ready; None for never. `answers`: text by artifact digest, or
    None for an error, and `delays` its seconds. `faults`: answered first, each for one method. `approvals`: the entries
    of the ConfigMap in which people approve, None where there is none; `people` act once, each at a read of it.
    `limits`: the namespace's ResourceQuotas and LimitRanges, by their plural; None where they may not be read.
    """

    def __init__(self) -> None:
        self.service: dict[str, Any] | None = None
        self.revisions: dict[str, str] = {}
        self.slow: int | None = 2
        self.answers: dict[str, str | None] = {}
        self.delays: dict[str, float] = {}
        self.faults: list[tuple[str, int, Any]] = []
        self.owned_by_others = False
        self.approvals: dict[str, str] | None = {}
        self.limits: dict[str, list[dict[str, Any]]] | None = {}
        self.people: list[Callable[[dict[str, str]], None]] = []
        self.written: list[dict[str, str]] = []
        self.applied: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self._reads, self._template = 0, None
        super().__init__()

    def serving(self) -> dict[str, int]:
        """The share of the traffic by artifact."""
        traffic = self.service["status"]["components"]["predictor"]["traffic"] if self.service else []
        return {self.revisions[target["revisionName"]]: target["percent"] for target in traffic if target["percent"]}

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: Any) -> tuple[int, Any]:
        if path.endswith("/v1/completions"):
            return self._complete(path.split("/")[1])
        if self.faults and self.faults[0][0] == method:
            return self.faults.pop(0)[1:]
        kind = path.rpartition("/")[2]
        if kind in ("resourcequotas", "limitranges"):
            if self.limits is None:
                return status(403, "Forbidden", f"{kind} is forbidden")
            return 200, {"items": self.limits.get(kind, [])}
        if "/configmaps/" in path:
            return self._config(method, path, query, body, headers)
        if method == "PATCH":
            return self._apply(query, body, headers)
        if self.service is None:
            return status(404, "NotFound", "inferenceservices not found", kind="inferenceservices")
        if method == "DELETE":
            self.service = None
            return 200, {}
        self._reads += 1
        self._reconcile()
        return 200, self.service

    def _config(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: Any) -> tuple[int, Any]:
        assert path == "/api/v1/namespaces/serving/configmaps/trimtab-approvals"
        if self.approvals is None:
            return status(404, "NotFound", 'configmaps "trimtab-approvals" not found', kind="configmaps")
        version = str(len(self.written))
        if method == "PATCH":
            assert headers["Content-Type"] == "application/merge-patch+json" and query["fieldManager"] == ["trimtab"]
            if body["metadata"].get("resourceVersion", version) != version:
                return status(409, "Conflict", "the object has been modified")
            if query.get("dryRun") != ["All"]:
                self.approvals |= body["data"]
                self.written.append(body["data"])
        elif self.people and any(entry.startswith("waiting") for entry in self.approvals.values()):
            self.people.pop(0)(self.approvals)
        return 200, {"metadata": {"resourceVersion": version}, "data": dict(self.approvals)}

    def _apply(self, query: dict[str, list[str]], body: Any, headers: Any) -> tuple[int, Any]:
        assert headers["Content-Type"] == "application/apply-patch+yaml" and query["fieldManager"] == ["trimtab"]
        if self.owned_by_others and query["force"] != ["true"]:
            return status(409, "Conflict", 'conflict with "argocd": .spec.predictor.minReplicas')
        before = self.service or {"metadata": {"annotations": {}, "generation": 0}, "status": {}}
        after = copy.deepcopy({**before, **body})
        after["metadata"] = {**before["metadata"], **body["metadata"]}
        after["metadata"]["annotations"] = {**before["metadata"]["annotations"], **body["metadata"]["annotations"]}
        after["metadata"]["generation"] = before["metadata"]["generation"] + 1
        if query.get("dryRun") == ["All"]:
            return 200, after
        self.applied.append(body)
        self.service, self._reads = after, 0
        return 200, after

    def _reconcile(self) -> None:
        """What KServe's controller does between two reads."""
        if self.slow is None or self._reads < self.slow:
            return
        digest = self.service["metadata"]["annotations"]["trimtab/artifact"]
        predictor = {name: part for name, part in self.service["spec"]["predictor"].items() if "canary" not in name}
        template = copy.deepcopy([predictor, self.service["metadata"]["annotations"]])  # KServe hands both on
        if template != self._template:
            self._template = template
            self.revisions[f"r{len(self.revisions) + 1}"] = digest
        latest = f"r{len(self.revisions)}"
        percent = self.service["spec"]["predictor"].get("canaryTrafficPercent")
        was = self.service["status"].get("components", {}).get("predictor", {})
        before, previous = was.get("latestRolledoutRevision"), was.get("previousRolledoutRevision", "")
        rolled_out = latest if percent is None else before
        if before and rolled_out != before:
            previous = before
        shares = {latest: 100} if percent is None else {latest: percent, before: 100 - percent}
        self.service["status"] = {
            "observedGeneration": 1,  # of Knative's service, which KServe passes off as its own
            "url": f"{self.host}/{latest}",
            "conditions": [{"type": "Ready", "status": "True"}],
            "components": {
                "predictor": {
                    "latestCreatedRevision": latest,
                    "latestReadyRevision": latest,
                    "latestRolledoutRevision": rolled_out,
                    "previousRolledoutRevision": previous,
                    "traffic": [
                        {"revisionName": name, "percent": share, "url": f"{self.host}/{name}"}
                        for name, share in shares.items()
                    ],
                }
            },
        }

    def _complete(self, revision: str) -> tuple[int, Any]:
        digest = self.revisions[revision]
        self.asked.append(digest)
        time.sleep(self.delays.get(digest, 0))
        text = self.answers.get(digest, "the same")
        return (500, "broken") if text is None else (200, {"choices": [{"text": text}]})
