"""The document that the server publishes is true, and no request that is made by it, or against it, makes it fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks
from serving import Running, serving

from trimtab.base.errors import InputError
from trimtab.components.engine.server import openapi, protocol
from trimtab.recipe import Engine

#: Answers are short: a fuzz asks for as many tokens as there is room for.
SHORT = Engine(max_seq_len=24, max_num_tokens=16, max_batch_size=4, enable_chunked_prefill=True)
#: Whether a request that is valid by its schema is answered is no question of the schema alone: it may be too long.
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def short(served: Path) -> Iterator[Running]:
    with serving(served, SHORT) as found:
        yield found


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_makes_it_fail(mode: GenerationMode, short: Running) -> None:
    """Neither one that fits the document nor one that does not."""
    found = schemathesis.openapi.from_url(f"{short.url}/openapi.json").get_all_operations()
    operations = {operation.label: operation for operation in (each.ok() for each in found)}
    assert len(operations) == 6  # all but that of the document itself
    for operation in operations.values():
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # any text is the name of a model
        count = 60 if operation.body else 5

        @settings(
            max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        ask()
    assert not short.server.worker.broken and short.wait_until_idle()


def test_every_route_is_in_the_document(short: Running) -> None:
    routes = {route.path.replace(":path", ""): route.methods - {"HEAD"} for route in short.server.app.routes}
    told = {path: {method.upper() for method in about} for path, about in openapi.document()["paths"].items()}
    assert told == routes


BODIES = [
    (protocol.Completion, {"prompt": "x", "max_tokens": 0}),
    (protocol.Completion, {"prompt": "x", "n": 3, "frequency_penalty": 0, "logit_bias": {}, "best_of": None}),
    (protocol.Completion, {"prompt": "x", "frequency_penalty": 0.5}),
    (protocol.Completion, {"prompt": "x", "suffix": "y"}),
    (protocol.Completion, {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}),
    (protocol.Completion, {"max_tokens": 3}),
    (protocol.Completion, {"prompt": "x", "promt": "y"}),
    (protocol.Chat, {"messages": []}),
    (protocol.Chat, {"messages": [{"role": "user", "content": "x", "refusal": None, "annotations": []}]}),
    (protocol.Chat, {"messages": [{"role": "user", "content": "x", "refusal": "no"}]}),
    (protocol.Chat, {"messages": [{"role": "king", "content": "x"}]}),
    (protocol.Chat, {"messages": [{"role": "user", "content": "x"}], "suffix": None, "echo": False}),
    (protocol.Chat, {"messages": [{"role": "user", "content": "x"}], "echo": True}),
]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_the_schema_takes_what_the_server_takes(kind: Any, body: dict[str, Any]) -> None:
    schemas = openapi.document()["components"]["schemas"]
    whole = {"$ref": f"#/components/schemas/{kind.__name__}", "components": {"schemas": schemas}}
    try:
        protocol.parse(kind, body)
        is_served = True
    except (InputError, ValidationError):
        is_served = False
    assert Draft202012Validator(whole).is_valid(body) == is_served
