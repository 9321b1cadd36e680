"""A registry of containers: Debian's `docker-registry` where it is installed, and a stand-in for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Registry:
    """The distribution API of OCI, as far as a push asks for it: a blob must be what its digest says, and a manifest
    may name only what was sent. With `login`, `user:password` in Base64, it asks for that; with `uses`, for tokens that
    it hands out for the login and that so many requests may show."""

    def __init__(self, login: str = "", uses: int = 0) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.requests: list[str] = []
        self.tokens: list[int] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None: ...

            def _answer(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                registry.requests.append(f"{self.command} {self.path}")
                shown = self.headers.get("Authorization")
                if self.path.startswith("/token"):
                    registry.tokens.append(uses)
                    given = json.dumps({"token": str(len(registry.tokens) - 1)}).encode()
                    status, headers, data = (200, {}, given) if shown == f"Basic {login}" else (401, {}, b"")
                elif login and not registry.may(shown, login, uses):
                    kind = f'Bearer realm="http://{registry.host}/token",service="x"' if uses else 'Basic realm="x"'
                    status, headers, data = 401, {"Www-Authenticate": kind}, b""
                else:
                    kind = self.headers.get("Content-Type", "")
                    status, headers, data = registry.answer(self.command, urlsplit(self.path), sent, kind)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _answer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._http.server_port}"
        self._parts = b""
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def may(self, shown: str | None, login: str, uses: int) -> bool:
        if not uses:
            return shown == f"Basic {login}"
        if not (shown or "").startswith("Bearer "):
            return False
        number = int(shown.removeprefix("Bearer "))
        self.tokens[number] -= 1
        return self.tokens[number] >= 0

    def answer(self, method: str, url, sent: bytes, kind: str) -> tuple[int, dict[str, str], bytes]:
        what, name = url.path.split("/")[-2:]
        if what == "blobs" and method in ("GET", "HEAD"):
            found = self.blobs.get(name)
            return (404, {}, b"") if found is None else (200, {"Content-Length": str(len(found))}, found)
        if what == "uploads" and method == "POST":
            self._parts = b""
            return 202, {"Location": f"{url.path}session"}, b""
        if what == "uploads":
            self._parts += sent
            if method == "PATCH":
                return 202, {"Location": url.path}, b""
            (digest,) = parse_qs(url.query)["digest"]
            if digest != _digest(self._parts):
                return 400, {}, b'{"errors": [{"code": "DIGEST_INVALID"}]}'
            self.blobs[digest] = self._parts
            return 201, {"Docker-Content-Digest": digest}, b""
        if what == "manifests" and method == "PUT":
            said, digest = json.loads(sent), _digest(sent)
            named = [said["config"], *said["layers"]] if "layers" in said else said["manifests"]
            known = self.blobs if "layers" in said else self.manifests
            if said["mediaType"] != kind or not all(part["digest"] in known for part in named):
                return 400, {}, b'{"errors": [{"code": "MANIFEST_BLOB_UNKNOWN"}]}'
            self.manifests[name] = self.manifests[digest] = kind, sent
            return 201, {"Docker-Content-Digest": digest}, b""
        if what == "manifests" and name in self.manifests:
            kind, found = self.manifests[name]
            return 200, {"Content-Type": kind, "Docker-Content-Digest": _digest(found)}, found
        return 404, {}, b""


@contextlib.contextmanager
def docker_registry(folder: Path) -> Iterator[str]:
    """Starts Debian's, and yields its host; the program must be there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    settings = folder / "registry.yml"
    settings.write_text(json.dumps({
        "version": "0.1", "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}}, "http": {"addr": host}
    }))  # fmt: skip
    process = subprocess.Popen(
        [shutil.which("docker-registry"), "serve", settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(host.split(":"), timeout=1):
                break
            time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(timeout=30)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
