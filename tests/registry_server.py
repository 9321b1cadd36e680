"""A stand-in for the Kubeflow Model Registry over real HTTP: what its client asks of one, kept in memory."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: Paths at which one object is looked for by its name, and what it is kept as.
ONE = {"registered_model": "registered_models", "model_version": "model_versions", "model_artifact": "artifacts"}


class RegistryServer:
    """`kept` by kind; `refuse` is the status of every answer, when set."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {"registered_models": [], "model_versions": [], "artifacts": []}
        self.refuse = 0
        self.log: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None: ...

            def _answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
                server.log.append((self.command, self.path))
                code, answer = server.answer(self.command, urlsplit(self.path), body)
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = _answer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, url: Any, body: Any) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse, {"code": str(self.refuse), "message": "no"}
        path = re.sub(r"^/api/model_registry/[^/]+/", "", url.path)
        kind = ONE.get(path, "")
        kind = kind or path.rpartition("/")[2].removesuffix("s") + "s"
        kind = {"versions": "model_versions"}.get(kind, kind)
        if method == "POST":
            item = {**body, "id": str(len(self.kept[kind]) + 1)}
            self.kept[kind].append(item)
            return 201, item
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        items = [item for item in self.kept[kind] if query.get("name", item.get("name")) == item.get("name")]
        if path in ONE:
            return (200, items[0]) if items else (404, {"code": "404", "message": "not found"})
        return 200, {"items": items, "size": len(items), "pageSize": 1, "nextPageToken": ""}
