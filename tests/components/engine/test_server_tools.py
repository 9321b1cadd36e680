"""Tools over HTTP, with a chat template that has them: what the model is told, what it calls, what comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from serving import Running, serving

from trimtab.components.engine.server import app

TEMPLATE = """{%- if tools %}TOOLS {% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments.city }}{% endfor %}
{%- endfor %}<assistant>"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CHAT = [{"role": "user", "content": "How warm is Rome?"}]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def speaking(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = shutil.copytree(served, tmp_path_factory.mktemp("tools") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(speaking: Running) -> OpenAI:
    return OpenAI(base_url=f"{speaking.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: whatever the model writes, its text becomes this one, a piece a token."""

    def say(text: str) -> None:
        class Said:
            stopped = False

            def __init__(self, tokenizer: Any, stops: list[str]):
                self.left = [text[place : place + 5] for place in range(0, len(text), 5)]

            def push(self, token: int) -> str:
                return self.left.pop(0) if self.left else ""

            def finish(self) -> str:
                rest, self.left = "".join(self.left), []
                return rest

        monkeypatch.setattr(app, "TextStream", Said)

    return say


def ask(client: OpenAI, messages: list[dict[str, Any]] = CHAT, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0, **options)


def test_a_call_is_answered_in_openai_s_form(client, says) -> None:
    says(f"Let me see. {CALL}")
    (choice,) = ask(client, tools=TOOLS).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see. "
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Rome"}


def test_a_stream_brings_calls_whole(client, says) -> None:
    says(f"Let me see. {CALL}{CALL}")
    text, calls, reason = "", [], None
    for chunk in ask(client, tools=TOOLS, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reason = choice.finish_reason or reason
    assert (text, reason) == ("Let me see. ", "tool_calls")
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather"), (1, "weather")]
    assert len({call.id for call in calls}) == 2
    one = ask(client, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls
    assert len(one) == 1


def test_without_tools_a_call_is_text(client, says) -> None:
    says(CALL)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = ask(client, **options).choices
        assert choice.message.content == CALL and choice.message.tool_calls is None
        assert choice.finish_reason == "length"


def test_a_history_of_calls_reaches_the_template(speaking: Running, client, says) -> None:
    """As OpenAI's client dumps an answer: fields that are null, arguments that are a text of JSON."""
    says(CALL)
    answer = ask(client, tools=TOOLS).choices[0].message
    brought = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "31 °C"}
    history = [*CHAT, answer.model_dump(), brought]
    asked = app.Chat.parse({"messages": history, "tools": TOOLS})
    text = speaking.server.questions._dialogue(asked)
    assert text.startswith("TOOLS weather <tool_call>") and "CALL weather Rome" in text and "<tool>31 °C" in text
    assert ask(client, history, tools=TOOLS).choices[0].message.tool_calls
