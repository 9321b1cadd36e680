"""The command watch-release against a stand-in for a service."""

from __future__ import annotations

import threading
import urllib.request
from typing import Any

import pytest
from json_server import JsonServer
from releases import ANSWERS, Released

from trimtab.base import signing
from trimtab.pipelines.commands import main
from trimtab.store import open_store


class Service(JsonServer):
    """OpenAI's completions as a service has them; `texts` are its answers by prompt."""

    def __init__(self) -> None:
        self.texts: dict[str, str | None] = dict(ANSWERS)
        self.asked: list[dict[str, Any]] = []
        self.key = ""
        super().__init__()

    def answer(self, method: str, path: str, query: Any, body: Any, headers: Any) -> tuple[int, Any] | None:
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": "who are you?"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        if path != "/v1/completions" or body["model"] != "tiny":
            return 404, {"error": "no such model"}
        self.asked.append(body)
        text = self.texts.get(body["prompt"])
        if text is None:
            return 500, {"error": "no"}
        return 200, {"choices": [{"text": text}], "usage": {"completion_tokens": 32}}


@pytest.fixture
def service():
    made = Service()
    yield made
    made.close()


@pytest.fixture
def released(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Released(open_store("trimtab-store"), tmp_path)


@pytest.fixture
def watch(trimtab, released):
    """A function: asks a service about the release."""
    return lambda *options: trimtab("watch-release", "tiny", *options)


def test_a_service_that_answers_as_its_release_did(watch, service, tmp_path):
    code, said = watch("--url", service.host, "--key", "gate.pub", "--metrics", tmp_path / "m.prom")
    assert code == 0, said
    assert said.startswith("watched tiny/000001: 100% begins alike, 100% the same;") and "refuses 50%, then 50%" in said
    assert [body["prompt"] for body in service.asked] == list(ANSWERS)
    assert all((body["temperature"], body["max_tokens"]) == (0, 32) for body in service.asked)
    assert 'trimtab_release_drift{release="tiny",version="000001"} 0\n' in (tmp_path / "m.prom").read_text()


def test_a_drift_has_an_exit_code_of_its_own(watch, service, tmp_path):
    service.texts = dict.fromkeys(ANSWERS, " Lyon")
    code, said = watch("--url", f"{service.host}/v1", "--metrics", tmp_path / "m.prom")
    assert code == 6 and "is not tiny/000001 as it was judged: 0% of the texts begins alike, less than 50%" in said
    assert "trimtab_release_drift" in (tmp_path / "m.prom").read_text()
    assert watch("--url", service.host, "--agreement", "0")[0] == 0


def test_one_prompt_without_an_answer_is_a_drift_and_none_at_all_is_trouble(watch, service):
    service.texts.pop(next(iter(ANSWERS)))
    code, said = watch("--url", service.host)
    assert code == 6 and "1 of 2 prompts got no answer" in said
    service.texts.clear()
    code, said = watch("--url", service.host)
    assert code == 4 and "answers none of 2 prompts" in said and "is the service up?" in said


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--url", "http://127.0.0.1:9"], 4, "names no model"),
        (["--url", "service"], 2, "url: 'service/v1/models' is none; write such as http://service:8000"),
        (["--model", "other"], 2, "has no 'other', or no /v1/completions; write --model as /v1/models has it"),
        (["--every", "5"], 2, "every: '5' is not valid; write such as 30s, 5m or 1h"),
        (["--port", "0"], 2, "port: 0 is for going on; write --every 5m with it"),
        (["--agreement", "2"], 2, "agreement: 2 is not valid; write 0 to 1"),
        (["--metrics", "missing/m.prom"], 2, "metrics: 'missing/m.prom' cannot be written"),
        (["--key", "other.pub"], 5, ""),
    ],
)
def test_bad_input(watch, service, tmp_path, options, code, message):
    signing.generate(tmp_path / "other")
    found, said = watch(*(options if "--url" in options else ["--url", service.host, *options]))
    assert found == code and message in said


def test_a_service_that_wants_a_key(watch, service, monkeypatch):
    service.key = "mine"
    code, said = watch("--url", service.host)
    assert code == 2 and "set OPENAI_API_KEY to a key of the service" in said
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    assert watch("--url", service.host)[0] == 0


def test_going_on_it_is_scraped(released, service, monkeypatch):
    from trimtab.components.deployment import watching
    from trimtab.pipelines.commands import watching as command

    seen, stop = [], threading.Event()
    made = watching.Exporter.__init__

    def noted(self, port):
        made(self, port)
        seen.append(self)

    def scrape(seconds):
        with urllib.request.urlopen(f"http://127.0.0.1:{seen[0].port}/metrics") as answer:
            seen.append(answer.read().decode())
        service.texts.clear()
        if len(seen) == 3:  # what trouble leaves stands is the last answer's
            stop.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.Exporter, "__init__", noted)
    monkeypatch.setattr(command.time, "sleep", scrape)
    assert main.main(["watch-release", "tiny", "--url", service.host, "--every", "1s", "--port", "0"]) == 130
    assert stop.is_set() and seen[1] == seen[2] and "trimtab_release_agreement" in seen[1]
