"""OpenAI's own client against the server: answers, streams, errors, clients that go, and many at once."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI
from serving import SETTINGS, Running
from starlette.testclient import TestClient

from trimtab.base.errors import Failure
from trimtab.components.engine.server.app import Server
from trimtab.components.engine.server.recorder import Recorder
from trimtab.components.engine.server.token_text import token_bytes, token_name
from trimtab.recipe import Engine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.service.paged_engine import PagedEngine
from trimtab.serving import request_log
from trimtab.serving.traffic import shape

PROMPT = "The river runs past the old mill"
CHAT = [{"role": "user", "content": "Where does the river run?"}]


@pytest.fixture(scope="module")
def client(running: Running) -> OpenAI:
    return OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def complete(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    settings = {"model": "tiny", "max_tokens": 24, "temperature": 0} | options
    return client.completions.create(prompt=prompt, **settings)


def post(running: Running, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(running.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def scrape(running: Running) -> dict[str, float]:
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_a_completion_is_the_engine_s_text(running: Running, client: OpenAI) -> None:
    engine = running.server.engine
    tokens = engine.tokenizer(PROMPT).input_ids
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.usage.prompt_tokens == len(tokens) and answer.usage.completion_tokens == 24
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert running.wait_until_idle()
    again = complete(client, prompt=tokens, extra_body={"ignore_eos": True})
    assert again.choices[0].text == answer.choices[0].text != ""


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9}, {"n": 3, "temperature": 1}])
def test_a_stream_has_the_text_of_the_answer(client: OpenAI, options: dict[str, Any]) -> None:
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 20, "temperature": 0, "seed": 3} | options
    whole = client.chat.completions.create(**asked)
    texts = [""] * len(whole.choices)
    reasons, usage = {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert len(set(texts)) == len(texts)  # each choice draws for itself


def test_several_prompts_are_answered_in_their_order(client: OpenAI) -> None:
    prompts = [PROMPT, "A small boat", "In winter"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompts)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]


def test_a_stop_string_ends_the_text_before_it(running: Running, client: OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text[6:9]
    expected = text[: text.index(stop)]
    assert complete(client, stop=["nowhere in it", stop]).choices[0].text == expected
    parts = [chunk.choices[0] for chunk in complete(client, stop=stop, stream=True)]
    assert "".join(part.text for part in parts) == expected and parts[-1].finish_reason == "stop"
    assert running.wait_until_idle()


def test_logprobs(running: Running, client: OpenAI) -> None:
    found = complete(client, max_tokens=5, logprobs=2).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 5
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == max(top.values()) == logprob < 0  # greedy
    chat = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [entry for chunk in chat for choice in chunk.choices if choice.logprobs
               for entry in choice.logprobs.content]  # fmt: skip
    assert len(entries) == 4 and all(len(entry.top_logprobs) == 3 for entry in entries)


def test_an_echo_begins_with_the_prompt_and_its_likelihoods(running: Running, client: OpenAI, served: Path) -> None:
    judge = TorchEngine(served, Engine(max_seq_len=512, max_batch_size=1), "cpu")
    prompts = [running.server.tokenizer(text).input_ids for text in (PROMPT * 6, "A small boat")]  # one in two chunks
    answer = complete(client, prompts, max_tokens=1, logprobs=1, echo=True)
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        told = choice.logprobs
        assert choice.text.startswith(running.server.tokenizer.decode(prompt))
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None) and told.text_offset[0] == 0
        assert len(told.tokens) == len(prompt) + answer.usage.completion_tokens // len(prompts)
        ((right, _),) = judge.loglikelihood([(prompt[:3], prompt[3:])])
        assert sum(told.token_logprobs[3 : len(prompt)]) == pytest.approx(right, abs=0.01 * len(prompt))
        rest = zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True)
        assert all(max(top.values()) >= own for own, top in rest)
    chunks = complete(client, prompts[1], max_tokens=3, logprobs=1, echo=True, stream=True)
    stream = [part.choices[0] for part in chunks]
    assert stream[0].text == "A small boat"
    offsets = [offset for part in stream if part.logprobs for offset in part.logprobs.text_offset]
    assert offsets == sorted(offsets) and len(offsets) >= len(prompts[1])
    assert complete(client, "A small boat", max_tokens=1, echo=True).choices[0].text.startswith("A small boat")


def test_a_stream_says_that_its_usage_comes(client: OpenAI) -> None:
    *chunks, last = complete(client, max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.usage.completion_tokens == 3 and last.choices == []
    assert all("usage" not in chunk.model_fields_set for chunk in complete(client, max_tokens=3, stream=True))


def test_bytes_of_half_a_character_are_its_bytes(running: Running) -> None:
    tokenizer = running.server.tokenizer
    tokens = tokenizer("🚤").input_ids
    assert b"".join(token_bytes(tokenizer, token) for token in tokens) == "🚤".encode()
    assert token_name(tokenizer, tokens[0]).startswith("bytes:\\xf0")


def test_lm_eval_asks_it_as_a_local_completions_model(running: Running, served: Path, monkeypatch) -> None:
    """lm-eval's own client, whose log-likelihoods are those that validation has of the same model."""
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    judge = TorchEngine(served, Engine(max_seq_len=512, max_batch_size=1), "cpu")
    asked = [(PROMPT, " and under"), ("A small", " boat carries apples"), ("In winter the", " children")]
    lm = LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions", model="tiny", tokenizer=str(served), tokenizer_backend="huggingface",
        batch_size=2, max_length=512,
    )  # fmt: skip
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    tokenizer = running.server.tokenizer
    pairs = [(tokenizer(a).input_ids, tokenizer(a + b).input_ids[len(tokenizer(a).input_ids) :]) for a, b in asked]
    right = judge.loglikelihood(pairs)
    for (score, greedy), (expected, likeliest), (_, tokens) in zip(found, right, pairs, strict=True):
        assert score == pytest.approx(expected, abs=0.02 * len(tokens)) and greedy == likeliest
    (text,) = lm.generate_until(
        [Instance("generate_until", {}, (PROMPT, {"until": ["\n\n"], "max_gen_toks": 4}), 0)], disable_tqdm=True
    )
    assert text == complete(client=OpenAI(base_url=f"{running.url}/v1", api_key="none"), max_tokens=4).choices[0].text


def test_models_and_health(running: Running, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with urllib.request.urlopen(f"{running.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


REFUSED = [
    ("completions", {"prompt": "x " * 600}, 400, "context_length_exceeded", "exceed engine.max_seq_len 512"),
    ("completions", {"prompt": PROMPT, "max_tokens": 0}, 400, None, "max_tokens: 0"),
    ("completions", {"prompt": PROMPT, "temperature": 3}, 400, None, "temperature: 3"),
    ("completions", {"prompt": PROMPT, "max_token": 3}, 400, None, "unknown key 'max_token'; write 'max_tokens'"),
    ("completions", {"prompt": PROMPT, "best_of": 2}, 400, None, "best_of: 2 is not served; leave it out"),
    *(("completions", {"prompt": prompt}, 400, None, "empty; write text, or") for prompt in ("", [], [[]], ["a", ""])),
    ("completions", {"prompt": "\ud83d"}, 400, None, "prompt: holds half of a surrogate pair"),
    ("completions", {"prompt": PROMPT, "\ud83d": 1}, 400, None, "unable to parse"),
    ("completions", {"prompt": [1, 2, 100000]}, 400, None, "token 100000 is not valid"),
    ("completions", {"prompt": ["a"] * 70, "n": 2}, 400, None, "70 prompts times n 2 are more than 128"),
    ("completions", {}, 400, None, "prompt: is required"),
    ("completions", {"prompt": PROMPT, "model": "gpt-9"}, 404, "model_not_found", "'gpt-9' is not served here"),
    ("chat/completions", {"messages": []}, 400, None, "messages"),
    ("chat/completions", {"messages": [{"role": "usr", "content": "x"}]}, 400, None, "write 'user'"),
    ("chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, 400, None, "function: is required"),
    ("chat/completions", {"messages": CHAT, "tools": TOOLS}, 400, None, "tools: the model's chat template has no"),
    ("chat/completions", {"messages": CHAT, "tool_choice": "required"}, 400, None, "cannot be made sure of"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, None, "messages: the model's chat"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, None, "content: is required"),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, None, "half of a surrogate pair"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, None, "write 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "code", "message"), REFUSED)
def test_what_cannot_be_served_gets_openai_s_error(running: Running, path, body, status, code, message) -> None:
    for stream in (False, True):  # a stream is refused before it begins
        found, error = post(running, f"/v1/{path}", json.dumps({**body, "stream": stream}).encode())
        assert found == status
        assert message in error["error"]["message"] and error["error"]["code"] == code
        assert error["error"]["type"] == "invalid_request_error"
    assert running.server.engine.scheduler.idle


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"{not json", 400, "the body is not JSON"),
        ("/v1/completions", b"\xff\xfe", 400, "the body is not JSON"),
        ("/v1/completions", b"[" * 200_000, 400, "the body is not JSON"),
        ("/v1/completions", b"[1]", 400, "the body must be a JSON object, got list"),
        ("/v1/completions", b" " * (5 << 20), 413, "more than 4194304 bytes"),
        ("/v1/embeddings", b"{}", 404, "POST /v1/embeddings is not served"),
    ],
    ids=["half", "bytes", "deep", "list", "large", "elsewhere"],
)
def test_bad_bodies_and_paths(running: Running, path, body, status, message) -> None:
    found, error = post(running, path, body)
    assert (found, message in error["error"]["message"]) == (status, True)


def test_openai_s_client_understands_an_error(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as caught:
        complete(client, max_tokens=600)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_blocks(running: Running, stream: bool) -> None:
    before = scrape(running).get('trimtab_requests_total{outcome="cancelled"}', 0)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 490, "stream": stream, "ignore_eos": True}).encode()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while running.server.engine.scheduler.idle:
            time.sleep(0.001)
        if stream:
            assert connection.recv(100)
    assert running.wait_until_idle(2)  # 490 tokens take longer
    assert scrape(running)['trimtab_requests_total{outcome="cancelled"}'] == before + 1


def test_metrics_count_what_was_done(running: Running, client: OpenAI) -> None:
    before = scrape(running)
    usage = complete(client, extra_body={"ignore_eos": True}).usage
    after = scrape(running)

    def rise(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert rise("trimtab_generated_tokens_total") == usage.completion_tokens == 24
    assert rise("trimtab_prompt_tokens_total") == usage.prompt_tokens
    assert rise('trimtab_requests_total{outcome="length"}') == 1
    assert rise("trimtab_time_to_first_token_seconds_count") == rise("trimtab_request_latency_seconds_count") == 1
    assert rise("trimtab_inter_token_latency_seconds_count") == 23
    assert after["trimtab_kv_blocks"] == 8 * 512 / 16 and after["trimtab_kv_blocks_used"] == 0


def own_threads() -> int:
    """How many there are but for the pools of anyio and asyncio, which keep as many as were once busy together."""
    return sum(not thread.name.startswith(("AnyIO", "asyncio")) for thread in threading.enumerate())


def test_many_clients_at_once(running: Running, client: OpenAI) -> None:
    """Each of 64 gets the text that it gets alone, up to ties; some stream, some go, none is lost."""
    lengths = [3 + 7 * i % 30 for i in range(64)]
    threads = own_threads()

    def ask(number: int) -> str | None:
        options = {"prompt": f"{number} {PROMPT}", "max_tokens": lengths[number], "extra_body": {"ignore_eos": True}}
        if number % 4 == 0:
            return complete(client, **options).choices[0].text
        stream, parts = complete(client, stream=True, **options), []
        for chunk in stream:
            parts.append(chunk.choices[0].text)
            if number % 4 == 1:
                stream.close()
                return None
        return "".join(parts)

    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(ask, range(64)))
    assert [number for number, text in enumerate(answers) if text is None] == list(range(1, 64, 4))
    assert running.wait_until_idle()
    assert not running.server.worker._readers
    assert own_threads() <= threads
    alone = [ask(number) for number in (0, 2, 3)]
    assert sum(a == b for a, b in zip(alone, (answers[0], answers[2], answers[3]), strict=True)) >= 2


def test_an_engine_that_fails_tells_those_who_wait(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all who come later, and whoever asks for its health."""
    server = Server(PagedEngine(served, SETTINGS, "cpu"), "tiny")

    def fail() -> None:
        raise Failure("does_not_fit", "activations did not fit: 2.00 GB more were needed")

    monkeypatch.setattr(server.engine, "step", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with TestClient(server.app) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json={"prompt": PROMPT})
            assert answer.status_code == 503 and "activations did not fit" in answer.json()["error"]["message"]
        assert "broken: activations did not fit" in client.get("/health").json()["status"]


def test_requests_are_recorded_without_what_they_say(running: Running, client: OpenAI, tmp_path: Path) -> None:
    """A line for each answer, one that was cancelled too; what was refused is none."""
    running.server.recorder = Recorder(tmp_path / "traffic")
    try:
        before = time.time()
        complete(client, extra_body={"ignore_eos": True})
        complete(client, n=2, max_tokens=3, extra_body={"ignore_eos": True})
        with pytest.raises(APIStatusError):
            complete(client, max_tokens=100_000)
        stream = complete(client, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        end = time.monotonic() + 60
        while not running.wait_until_idle() or running.server.worker._readers:
            assert time.monotonic() < end
        (log,) = (tmp_path / "traffic").iterdir()
        said = log.read_text()
        lines = [json.loads(line) for line in said.splitlines()]
        tokens = len(running.server.engine.tokenizer(PROMPT).input_ids)
        assert {line["input_tokens"] for line in lines} == {tokens}
        assert [line["outcome"] for line in lines] == ["length", "length", "length", "cancelled"]
        assert [line["output_tokens"] for line in lines[:3]] == [24, 3, 3] and 0 < lines[3]["output_tokens"] < 400
        assert all(0 < line["first_token_seconds"] <= line["seconds"] < 60 for line in lines)
        assert all(before - 1 < line["time"] < time.time() + 1 for line in lines)
        assert not any(word in said for word in (*PROMPT.split(), "tiny"))
        found = shape(request_log.read(str(tmp_path / "traffic")))
        longest = max(line["output_tokens"] for line in lines)
        assert (found.requests, found.input.p50, found.total) == (4, tokens, tokens + longest)
    finally:
        running.server.recorder = None
