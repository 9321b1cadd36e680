"""A stand-in for the Kubeflow Model Registry over real HTTP: what its client asks of one, kept in memory."""

from __future__ import annotations

import re
from typing import Any

from json_server import JsonServer

#: Paths at which one object is looked for by its name, and what it is kept as.
ONE = {"registered_model": "registered_models", "model_version": "model_versions", "model_artifact": "artifacts"}


class RegistryServer(JsonServer):
    """`kept` by kind; `refuse` is the status of every answer, when set."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {"registered_models": [], "model_versions": [], "artifacts": []}
        self.refuse = 0
        self.log: list[tuple[str, str]] = []
        super().__init__()

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: Any) -> tuple[int, Any]:
        self.log.append((method, path))
        if self.refuse:
            return self.refuse, {"code": str(self.refuse), "message": "no"}
        path = re.sub(r"^/api/model_registry/[^/]+/", "", path)
        kind = ONE.get(path, "")
        kind = kind or path.rpartition("/")[2].removesuffix("s") + "s"
        kind = {"versions": "model_versions"}.get(kind, kind)
        if method == "POST":
            item = {**body, "id": str(len(self.kept[kind]) + 1)}
            self.kept[kind].append(item)
            return 201, item
        items = [item for item in self.kept[kind] if query.get("name", [item.get("name")]) == [item.get("name")]]
        if path in ONE:
            return (200, items[0]) if items else (404, {"code": "404", "message": "not found"})
        return 200, {"items": items, "size": len(items), "pageSize": 1, "nextPageToken": ""}
