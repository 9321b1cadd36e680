"""Any body at all gets an answer or an error in OpenAI's form: never 500, and the engine goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from trimtab.components.engine.server.app import Server
from trimtab.recipe import Engine
from trimtab.runtime.service.paged_engine import PagedEngine

SHORT = Engine(max_seq_len=40, max_num_tokens=16, max_batch_size=4, enable_chunked_prefill=True)
TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)  # half characters among them
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY = st.recursive(
    SCALAR, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3), max_leaves=6
)
FIELDS = [
    "model", "prompt", "messages", "stream", "stream_options", "n", "temperature", "top_p", "seed", "stop",
    "ignore_eos", "user", "metadata", "store", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
    "echo", "tools", "tool_choice", "parallel_tool_calls", "best_of", "logit_bias", "response_format", "suffix",
    "frequency_penalty",
]  # fmt: skip
TOKENS = st.lists(st.integers(-2, 400), max_size=6)
CALLED = st.fixed_dictionaries({"name": TEXT}, optional={"arguments": TEXT | ANY})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | ANY,
        "content": TEXT | ANY,
        "name": ANY,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": CALLED})) | ANY,
        "tool_call_id": ANY,
    },
)
#: What may be served, of each field that shapes an answer; half characters and numbers out of range are among it.
NEARLY = {
    "prompt": TEXT | TOKENS | st.lists(TEXT, max_size=3) | st.lists(TOKENS, max_size=3),
    "messages": st.lists(MESSAGE, max_size=3),
    "max_tokens": st.integers(1, 6),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "seed": st.integers(),
    "logprobs": st.integers(0, 20),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "echo": st.booleans(),
    "ignore_eos": st.booleans(),
    "user": TEXT,
}
CHAT = {
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "tools": st.just([]),
    "max_completion_tokens": st.integers(1, 6),
}
BEGUN = st.text(min_size=1, max_size=12) | st.lists(st.integers(0, 260), min_size=1, max_size=6)
COMPLETION = st.fixed_dictionaries(
    {"prompt": BEGUN | st.lists(BEGUN, min_size=1, max_size=3) | NEARLY["prompt"]},
    optional={name: kind for name, kind in NEARLY.items() if name not in ("prompt", "messages")},
)
DIALOGUE = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "x"}]) | NEARLY["messages"]},
    optional={name: kind for name, kind in (NEARLY | CHAT).items() if name not in ("prompt", "echo", "messages")},
)
WILD = st.dictionaries(st.sampled_from(FIELDS) | TEXT, ANY, max_size=4)
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def client(served: Path) -> Iterator[TestClient]:
    with TestClient(Server(PagedEngine(served, SHORT, "cpu"), "tiny").app, raise_server_exceptions=False) as found:
        yield found


def post(client: TestClient, path: str, body: Any) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)
    if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]" and all("error" not in json.loads(line) for line in lines[:-1])
    elif answer.status_code == 200:
        assert answer.json()["choices"]
    else:
        assert answer.json()["error"]["message"]


#: A path, and a body that is nearly right, or right but for a few fields, or anything.
ASKED = st.one_of(
    st.tuples(st.just(PATHS[0]), COMPLETION),
    st.tuples(st.just(PATHS[1]), DIALOGUE),
    st.tuples(st.just(PATHS[0]), st.builds(lambda body, wild: body | wild, COMPLETION, WILD)),
    st.tuples(st.sampled_from(PATHS), ANY),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(asked=ASKED)
def test_no_body_makes_it_fail(client: TestClient, asked: tuple[str, Any]) -> None:
    post(client, *asked)
    assert client.get("/health").json() == {"status": "ok"}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(data=st.binary(max_size=40), name=TEXT)
def test_no_bytes_and_no_path_make_it_fail(client: TestClient, data: bytes, name: str) -> None:
    assert client.post(PATHS[0], content=data).status_code == 400
    path = f"/v1/models/x{name.encode('utf-8', 'replace').hex()}"
    assert client.get(path).status_code == 404
    refused = client.request("PATCH", PATHS[1])
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")  # RFC 9110, 15.5.6: it must name them
