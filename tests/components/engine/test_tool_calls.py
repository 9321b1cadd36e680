"""Calls in a model's text, whole and in pieces, in the forms that chat templates teach."""

from __future__ import annotations

import pytest

from trimtab.components.engine.server.tool_calls import CallReader, form

NAMES = ["weather", "time"]
ONE = '{"name": "weather", "arguments": {"city": "Rome"}}'
TWO = '{"name": "time", "arguments": {}}'
CALLS = [("weather", '{"city": "Rome"}'), ("time", "{}")]
TAGGED = f"Let me see.<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>"
LLAMA = '{"name": "weather", "parameters": {"city": "Rome"}}'
#: The form, a text, what is said, what is called.
TEXTS = [
    ("tags", TAGGED, "Let me see.\n", CALLS),
    ("tags", f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", CALLS),
    ("tags", f"<tool_call>{ONE}", "", CALLS[:1]),  # the end of the text is its end
    ("tags", "a < b and <tool box", "a < b and <tool box", []),
    ("tags", "<tool_call>not JSON</tool_call> so", "<tool_call>not JSON</tool_call> so", []),
    ("tags", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    ("tags", ONE, ONE, []),
    ("json", LLAMA, "", CALLS[:1]),
    ("json", f"{LLAMA}; {TWO}", "", CALLS),
    ("json", '{"answer": 42}', '{"answer": 42}', []),
    ("json", f"I call {LLAMA}", f"I call {LLAMA}", []),
    ("json", '{"name": "weather", "arguments": "{\\"city\\": 1}"}', "", [("weather", '{"city": 1}')]),
]


def read(kind: str, parts: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]], list[str]]:
    reader, said, calls = CallReader(kind, NAMES, most), "", []
    for new, found in [*map(reader.push, parts), reader.finish()]:
        said += new
        calls += found
    return said, [(call.name, call.arguments) for call in calls], [call.identity for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("kind", "text", "said", "calls"), TEXTS)
def test_calls_are_found_however_the_text_comes(kind, text, said, calls, size):
    parts = [text[place : place + size] for place in range(0, len(text), size)]
    found, called, identities = read(kind, parts)
    assert (found, called) == (text if said is None else said, calls)
    assert len(set(identities)) == len(identities)


def test_one_call_at_a_time():
    assert read("tags", [TAGGED], most=1)[1] == CALLS[:1]


def test_text_before_a_call_is_told_at_once():
    reader = CallReader("tags", NAMES)
    assert reader.push("Let me see.<to") == ("Let me see.", [])
    assert reader.push("ad") == ("<toad", [])


TEMPLATES = [
    ("{% if tools %}<tool_call>{% endif %}", "tags"),
    ({"default": "", "tool_use": "{{ tools }}<tool_call>"}, "tags"),
    ('{% if tools %}{"name": x, "parameters": y}{% endif %} ipython', "json"),
    ("{% if tools %}<tool_call><function=name>{% endif %}", ""),
    ("{% if tools %}[TOOL_CALLS]{% endif %}", ""),
    ("<tool_call> in a text", ""),
    (None, ""),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_the_form_is_that_of_the_template(template, expected):
    assert form(template) == expected
