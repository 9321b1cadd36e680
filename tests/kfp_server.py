"""A stand-in for a Kubeflow Pipelines API server over real HTTP: what trimtab asks of one, kept in memory."""

from __future__ import annotations

import json
import re
from typing import Any

from json_server import JsonServer

#: What a list is called in an answer, by its path.
LISTS = {
    "pipelines": "pipelines",
    "versions": "pipeline_versions",
    "experiments": "experiments",
    "recurringruns": "recurringRuns",
}


class KfpServer(JsonServer):
    """`kept` holds what was created; `faults` are answered first: a status with a message, or "drop"."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {name: [] for name in (*LISTS, "runs")}
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[tuple[int | str, str]] = []
        self.multi_user, self.tag = False, "2.17.0"
        #: What a proxy answers to everything instead, such as its login page.
        self.page = ""
        #: What each further look at a run shows; the last stays.
        self.story: list[dict[str, Any]] = []
        super().__init__()

    def answer(
        self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: Any
    ) -> tuple[int, Any] | None:
        self.headers.append(dict(headers))
        path = path.removeprefix("/apis/v2beta1/")
        fault = self.faults.pop(0) if self.faults and "healthz" not in path else None
        if fault and fault[0] == "drop":
            return None
        self.requests.append((method, path, body))
        if fault:
            status, answer = fault[0], {"message": fault[1]}
        else:
            status, answer = self.reply(method, path, {name: values[0] for name, values in query.items()}, body)
        return status, self.page or answer

    def reply(self, method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        if path.endswith("healthz"):
            return 200, {"multi_user": self.multi_user, **({"tag_name": self.tag} if "v1beta1" in path else {})}
        if path == "pipelines/upload_version":
            return self._create("versions", {"display_name": query["name"], "pipeline_id": query["pipelineid"]})
        kind = re.sub(r"^pipelines/[^/]+/versions", "versions", path).split("/")[0]
        name = path.rpartition("/")[2]
        if method == "POST":
            return self._create(kind, sent)
        if method == "DELETE":
            self.kept[kind] = [item for item in self.kept[kind] if item["recurring_run_id"] != name]
            return 200, {}
        if kind == "runs":
            if not any(run["run_id"] == name for run in self.kept["runs"]):
                return 404, {"message": f"Run {name} not found"}
            self.kept["runs"][0].update(self.story.pop(0) if len(self.story) > 1 else self.story[0])
            return 200, self.kept["runs"][0]
        wanted = json.loads(query["filter"])["predicates"][0]["stringValue"] if query.get("filter") else None
        items = [item for item in self.kept[kind] if wanted in (None, item["display_name"])]
        begin, size = int(query.get("page_token") or 0), min(int(query.get("page_size") or 10), 2)
        more = {"next_page_token": str(begin + size)} if begin + size < len(items) else {}
        return 200, {LISTS[kind]: items[begin : begin + size], **more}

    def _create(self, kind: str, item: dict[str, Any]) -> tuple[int, Any]:
        if kind in ("pipelines", "versions") and any(
            known["display_name"] == item["display_name"] for known in self.kept[kind]
        ):
            return 409, {"message": f"{item['display_name']} already exists"}
        singular = {"versions": "pipeline_version", "recurringruns": "recurring_run"}.get(kind, kind[:-1])
        kept = {**item, f"{singular}_id": f"{singular.replace('_', '-')}-{len(self.kept[kind]) + 1}"}
        self.kept[kind].append(kept)
        return 200, kept
