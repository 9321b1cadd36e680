"""A stand-in for the Kubernetes API with KServe, over real HTTP: InferenceServices, and the models behind them."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from typing import Any

from json_server import JsonServer


def status(code: int, reason: str, message: str, **details: str) -> tuple[int, dict[str, Any]]:
    """An error as the API answers it."""
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "details": details}


class KubernetesServer(JsonServer):
    """One service, as KServe on Knative keeps it: each change of what is served is a revision.

    `slow`: reads of the service until a new revision is ready; None for never. `answers`: text by artifact digest, or
    None for an error, and `delays` its seconds. `faults`: answered first, each for one method.
    """

    def __init__(self) -> None:
        self.service: dict[str, Any] | None = None
        self.revisions: dict[str, str] = {}
        self.slow: int | None = 2
        self.answers: dict[str, str | None] = {}
        self.delays: dict[str, float] = {}
        self.faults: list[tuple[str, int, Any]] = []
        self.owned_by_others = False
        self.applied: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self._reads = 0
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
        latest = "r" + hashlib.sha256(json.dumps(predictor, sort_keys=True).encode()).hexdigest()[:8]
        self.revisions[latest] = digest
        percent = self.service["spec"]["predictor"].get("canaryTrafficPercent")
        before = self.service["status"].get("components", {}).get("predictor", {}).get("latestRolledoutRevision")
        rolled_out = latest if percent is None else before
        shares = {latest: 100} if percent is None else {latest: percent, before: 100 - percent}
        self.service["status"] = {
            "observedGeneration": self.service["metadata"]["generation"],
            "url": f"{self.host}/{latest}",
            "conditions": [{"type": "Ready", "status": "True"}],
            "components": {
                "predictor": {
                    "latestCreatedRevision": latest,
                    "latestReadyRevision": latest,
                    "latestRolledoutRevision": rolled_out,
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
