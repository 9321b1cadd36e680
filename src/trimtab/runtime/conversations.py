"""Conversations as a chat template writes them: OpenAI's form of messages, brought to what templates take.

A template is a program of the model's: most take a text as the content of a message and nothing else, and write a list
of parts, or null, as Python would print it. So parts of text are joined, null is empty, and the arguments of a tool
call, which OpenAI writes as a text of JSON, become the mapping that transformers documents
(huggingface.co/docs/transformers/chat_extras).
"""

from __future__ import annotations

import json
from typing import Any

import jinja2

_FORM = 'it must be a string, or a list of {"role": …, "content": …}'


def render(messages: Any, tokenizer: Any, tools: Any = None) -> str:
    """Returns the text of a conversation.

    Args:
        messages: a list of {"role", "content"}; content is a text, null, or a list of {"type": "text", "text": …}.
            A message may have "tool_calls", and then needs no content.
        tokenizer: has the chat template; None where messages are not read.
        tools: the functions that could be called, a list.

    Raises:
        ValueError: these are no such messages, or the template does not take them; says what is wrong.
    """
    plain = normalized(messages)
    if tokenizer is None:
        raise ValueError('holds "messages", which are not read here; write "text"')
    if not tokenizer.chat_template:
        raise ValueError("holds messages, and the model's tokenizer has no chat template; write them out as text")
    tools = _tools(tools)
    try:
        text = tokenizer.apply_chat_template(plain, tools=tools, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"holds messages that the model's chat template refuses: {error}") from None
    for message in plain:
        for call in message.get("tool_calls", ()):
            if str(call["function"]["name"]) not in text:
                raise ValueError("holds tool calls, which the model's chat template leaves out; write them out as text")
    return text


def normalized(messages: Any) -> list[dict[str, Any]]:
    """Returns the messages with text for content, and mappings for the arguments of tool calls.

    Raises:
        ValueError: as `render`.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"holds {_short(messages)}; {_FORM}")
    return [_message(message, messages) for message in messages]


def _message(message: Any, messages: list[Any]) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"holds {_short(messages)}; {_FORM}")
    # Tables of datasets fill what a message does not have with null.
    found = {name: value for name, value in message.items() if value is not None}
    if "content" not in message and not found.get("tool_calls"):
        raise ValueError(f"holds {_short(messages)}; {_FORM}")
    found["content"] = _content(message.get("content"), messages)
    if calls := found.pop("tool_calls", None):
        found["tool_calls"] = [_call(call, messages) for call in calls] if isinstance(calls, list) else _bad(messages)
    return found


def _content(content: Any, messages: list[Any]) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"holds {_short(messages)}; {_FORM}")
    kinds = {str(part.get("type")) for part in content} - {"text"}
    if kinds:
        raise ValueError(f"holds parts of a message that are no text ({', '.join(sorted(kinds))}); leave them out")
    if not all(isinstance(part.get("text"), str) for part in content):
        raise ValueError(f"holds {_short(messages)}; {_FORM}")
    return "".join(part["text"] for part in content)


def _call(call: Any, messages: list[Any]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _bad(messages)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError(f"holds a tool call whose arguments are no JSON: {_short(arguments)}") from None
    kept = {name: value for name, value in call.items() if name in ("id", "type") and value is not None}
    return {**kept, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Returns the functions as a list; datasets hold them as a text of JSON too."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools or "[]")
        except ValueError:
            found = tools
    if found and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ValueError(f'holds "tools" {_short(tools)}; they must be a list of JSON objects')
    return found or None


def _bad(messages: list[Any]) -> Any:
    form = '{"type": "function", "function": {"name": …, "arguments": {…}}}'
    raise ValueError(f'holds "tool_calls" in {_short(messages)}; each must be {form}')


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
