"""Calls of tools in a model's text, by the form that its chat template teaches; OpenAI's form of them outside.

| form | a call in the text | templates |
|---|---|---|
| tags | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, or a list of such | Hermes, Qwen 2.5 and 3, SmolLM2 |
| json | the whole answer is `{"name": …, "parameters": {…}}`, or several behind one another | Llama 3.1 to 3.3 |
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, JSON."""

    name: str
    arguments: str
    identity: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def said(self) -> dict[str, Any]:
        """OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.identity, "type": "function", "function": function}


def form(template: str | Mapping[str, str] | None) -> str:
    """Returns in which form a chat template has tools called: "tags" or "json"; "" where it has none that is read."""
    text = template if isinstance(template, str) else " ".join((template or {}).values())
    if "tools" not in text or "<function=" in text:  # Qwen3-Coder's calls are XML
        return ""
    if _OPEN in text:
        return "tags"
    return "json" if '"parameters"' in text and "ipython" in text else ""


class CallReader:
    """Parts the text of one answer into what is said and what is called.

    Args:
        form: as `form` returns it.
        names: the functions that may be called; what calls another is text.
        most: calls that count at most; what comes behind them is dropped.
    """

    def __init__(self, form: str, names: Sequence[str], most: int | None = None):
        self._form, self._names, self._most = form, set(names), most
        self._held, self._found = "", 0
        self._is_text = False  # once something was said, an answer that is one call is none

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Takes text and returns what is certain by it: text that is said, and calls that are whole."""
        self._held += text
        if self._form == "json":
            if not self._is_text and self._held.lstrip()[:1] in ("", "{"):
                return "", []
            self._is_text = True
            return self._release(), []
        said, calls = "", []
        while True:
            before, opened, rest = self._held.partition(_OPEN)
            if not opened:
                kept = _beginning(self._held, _OPEN)
                text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
                return said + text, calls
            inside, closed, after = rest.partition(_CLOSE)
            if not closed:
                self._held = opened + rest
                return said + before, calls
            self._held = after
            found = self._counted(self._read(inside))
            calls += found
            said += before if found else before + opened + inside + closed

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Returns the rest when no more text comes; a last call may lack its end."""
        rest = self._release()
        is_call = rest.startswith(_OPEN) if self._form == "tags" else bool(rest.strip())
        calls = self._counted(self._read(rest.removeprefix(_OPEN))) if is_call else []
        return ("", calls) if calls else (rest, [])

    def _release(self) -> str:
        text, self._held = self._held, ""
        return text

    def _counted(self, calls: list[ToolCall]) -> list[ToolCall]:
        left = len(calls) if self._most is None else max(0, self._most - self._found)
        self._found += len(calls)
        return calls[:left]

    def _read(self, text: str) -> list[ToolCall]:
        """Returns the calls in a text that is nothing else, else []."""
        decoder, place, found = json.JSONDecoder(), 0, []
        text = text.strip()
        while place < len(text):
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                return []
            calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
            if any(call is None or call.name not in self._names for call in calls):
                return []
            found += calls
            while place < len(text) and text[place] in " \t\r\n;,":
                place += 1
        return found


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text)


def _beginning(text: str, mark: str) -> int:
    """Returns how many of the last characters may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
