"""Asks a deployed service the fixed prompts of its release, and exports what is seen to Prometheus."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trimtab.base.errors import InputError, StageError
from trimtab.release.watch import Answer

#: Tokens of an answer in the evidence: those of `evaluation.generation`.
TOKENS = 32
TIMEOUT = 120.0


def ask(url: str, model: str, prompts: Iterable[str], timeout: float = TIMEOUT, token: str = "") -> dict[str, Answer]:
    """Asks a service of OpenAI's completions API each prompt by itself, greedily; trouble with one is no answer.

    Args:
        url: the service, with or without /v1.
        model: as the service calls it; its first one if "".
        token: sent as a bearer token, where the service wants one.

    Raises:
        StageError: the service gives no answer at all.
        InputError: it refuses the key, or has no such model.
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    model = model or _first_model(base, headers, timeout)
    found, trouble = {}, ""
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        started = time.monotonic()
        try:
            said = _json(f"{base}/completions", headers, timeout, body)
            text, tokens = said["choices"][0]["text"], int((said.get("usage") or {}).get("completion_tokens") or 0)
        except (OSError, ValueError, LookupError, TypeError) as error:
            _refuse(url, model, error)
            text, tokens, trouble = None, 0, f"{type(error).__name__}: {error}"
        found[prompt] = Answer(text, tokens, time.monotonic() - started)
    if found and all(answer.text is None for answer in found.values()):
        raise StageError(f"{url} answers none of {len(found)} prompts ({trouble}); is the service up?")
    return found


def _first_model(base: str, headers: dict[str, str], timeout: float) -> str:
    try:
        return _json(f"{base}/models", headers, timeout)["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        _refuse(base, "", error)
        why = f"{type(error).__name__}: {error}"
        raise StageError(f"{base}/models names no model ({why}); is the service up? else write --model") from None


def _refuse(url: str, model: str, error: Exception) -> None:
    """Raises what the user must change, where the service says so."""
    code = error.code if isinstance(error, urllib.error.HTTPError) else 0
    if code in (401, 403):
        raise InputError(f"url: {url} refuses the request ({code}); set OPENAI_API_KEY to a key of the service")
    if code == 404:
        raise InputError(f"model: {url} has no '{model}', or no /v1/completions; write --model as /v1/models has it")


def _json(url: str, headers: dict[str, str], timeout: float, body: dict[str, Any] | None = None) -> Any:
    try:
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    except ValueError:
        raise InputError(f"url: '{url}' is none; write such as http://service:8000") from None
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


class Exporter:
    """What Prometheus scrapes: the text that was set last, under /metrics, on a port of its own."""

    def __init__(self, port: int):
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None: ...

            def do_GET(self) -> None:
                known = self.path.partition("?")[0] in ("/metrics", "/healthz")
                data = (exporter.text if self.path.startswith("/metrics") else "").encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.text = ""
        try:
            self._server = ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            raise InputError(f"port: {port} cannot be opened ({error.strerror}); write another") from None
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def exported(port: int | None) -> Iterator[Exporter | None]:
    """Serves /metrics while the body runs; None for no port."""
    exporter = Exporter(port) if port is not None else None
    try:
        yield exporter
    finally:
        if exporter:
            exporter.close()
