"""What the server answers, as an OpenAPI 3.1 document: its requests are the schemas that validate them."""

from __future__ import annotations

from typing import Any

from trimtab.base import environment
from trimtab.components.engine.server import protocol

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}


def _object(**fields: Any) -> dict[str, Any]:
    """An object that has at least these fields."""
    return {"type": "object", "required": list(fields), "properties": fields}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)
_ANSWERED = {
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_list({"$ref": "#/components/schemas/Model"})),
    "Answer": _object(
        id=_TEXT,
        object={"enum": ["text_completion", "chat.completion"]},
        created=_COUNT,
        model=_TEXT,
        choices=_list(_object(index=_COUNT, finish_reason=_TEXT)),
        usage=_object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "Error": _object(error=_object(message=_TEXT, type=_TEXT)),
    "Health": _object(status=_TEXT),
}
_REFUSED = {
    400: "A field that is not valid, or not served; the message says what to write instead.",
    404: "Another model is asked for.",
    413: "The body is too long.",
    503: "The server is shutting down, or its engine is broken.",
}


def document() -> dict[str, Any]:
    """Returns the document."""
    requests: dict[str, Any] = {}
    for kind in (protocol.Completion, protocol.Chat):
        requests |= protocol.schemas(kind)
    model = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    paths = {
        "/v1/models": {"get": _told("The model that is served.", "Models")},
        "/v1/models/{model}": {"get": _told("The model, by its name.", "Model", 404) | {"parameters": [model]}},
        "/v1/completions": {"post": _asked("Continues a text.", "Completion")},
        "/v1/chat/completions": {"post": _asked("Answers a conversation.", "Chat")},
        "/health": {"get": _told("Whether the server answers.", "Health")},
        "/metrics": {"get": _described("Prometheus metrics.", {"text/plain": {"schema": _TEXT}})},
        "/openapi.json": {"get": _described("This document.", {"application/json": {"schema": {"type": "object"}}})},
    }
    paths["/health"]["get"]["responses"]["503"] = _response("It does not.", "Health")
    return {
        "openapi": "3.1.0",
        "info": {"title": "trimtab serve", "version": environment.installed(["trimtab"])["trimtab"]},
        "paths": paths,
        "components": {"schemas": requests | _ANSWERED},
    }


def _asked(what: str, kind: str) -> dict[str, Any]:
    found = _told(what, "Answer", *_REFUSED)
    found["responses"]["200"]["content"]["text/event-stream"] = {"schema": _TEXT}  # where `stream` is asked for
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
    return found | {"requestBody": {"required": True, "content": body}}


def _told(what: str, kind: str, *refused: int) -> dict[str, Any]:
    responses = {"200": _response(what, kind)}
    responses |= {str(status): _response(_REFUSED[status], "Error") for status in refused}
    return {"summary": what, "responses": responses}


def _described(what: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"summary": what, "responses": {"200": {"description": what, "content": content}}}


def _response(what: str, kind: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind}"}
    return {"description": what, "content": {"application/json": {"schema": schema}}}
