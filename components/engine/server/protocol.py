"""OpenAI's requests, as far as they are served; what would change an answer and is not, is refused.

Source: the reference of OpenAI's API, /v1/completions and /v1/chat/completions. `ignore_eos` is vLLM's, for measuring.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.runtime.service.sampling import Sampling

#: Answers of one request at most: prompts times `n`.
MAX_CHOICES = 128
#: Fields that are accepted with the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None,
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": [],
}  # fmt: skip
#: Fields of a message that clients send back as they got them, and that say nothing.
_SILENT = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "tool_call_id")


class _Generation(Document):
    """What both interfaces have."""

    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    # These identify or file a request, and change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, number: int, logprobs: int | None) -> Sampling:
        """Returns the settings of one choice: each draws other numbers from the same seed."""
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = None if self.seed is None else self.seed * MAX_CHOICES + number
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed, logprobs)


class Completion(_Generation):
    """A request to /v1/completions; `prompt` is text, tokens, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @field_validator("prompt")
    @classmethod
    def _asks_something(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("is empty; write text, or at least one token")
        if isinstance(prompt, list) and not isinstance(prompt[0], int) and not all(prompt):
            raise ValueError("has one that is empty; write text, or at least one token")
        return prompt

    @property
    def echoes(self) -> bool:
        return self.echo

    def prompts(self) -> list[str | list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def most(self) -> int | None:
        return self.max_tokens


class Called(Document):
    """Which function a model called, and with which arguments, JSON."""

    name: str
    arguments: str = "{}"


class CalledTool(Document):
    """A call that a model made in an earlier turn."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """Returns the call as chat templates take it, which write its arguments as JSON themselves."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Document):
    """A turn of a conversation; of parts only text is understood."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if not (key in _SILENT and value in (None, []))}

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: is required; write text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: a turn of the {self.role} calls nothing; write role: assistant")
        return self

    @property
    def uses_tools(self) -> bool:
        """Whether it tells of a call or of what one brought."""
        return bool(self.tool_calls) or self.role == "tool"

    def plain(self) -> dict[str, Any]:
        """Returns the turn as a chat template takes it.

        Raises:
            InputError: a part that is not text.
        """
        said = {"role": self.role, "content": self._text()}
        said |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key))}
        if self.tool_calls:
            said["tool_calls"] = [call.plain() for call in self.tool_calls]
        return said

    def _text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"messages.content: a part of type {part.get('type')!r} is not served; write 'text'")
        return "".join(part["text"] for part in self.content)


class Function(Document):
    """What a tool is called, what it does, and what it takes, a JSON schema."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Document):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Returns it as chat templates take it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class Chat(_Generation):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice")
    @classmethod
    def _leaves_the_choice_to_the_model(cls, choice: Any) -> Any:
        if choice not in (None, "auto", "none"):
            raise ValueError(f"{choice!r} cannot be made sure of; write 'auto', or 'none'")
        return choice

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def schemas(kind: type[_Generation]) -> dict[str, Any]:
    """Returns the JSON schemas of a request and of its parts by their names, as an OpenAPI document has them."""
    whole = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    found = {**whole.pop("$defs", {}), kind.__name__: whole}
    _accept(whole, {name: [value, None] for name, value in _NEUTRAL.items()})
    if "Message" in found:
        _accept(found["Message"], dict.fromkeys(_SILENT, [None, []]))
    return found


def _accept(schema: dict[str, Any], fields: dict[str, list[Any]]) -> None:
    """Adds to a schema the fields that it lacks and that are accepted with these values alone."""
    for name, values in fields.items():
        schema["properties"].setdefault(name, {"enum": values})


def parse(kind: type[_Generation], body: Any) -> Any:
    """Reads a request.

    Raises:
        InputError: names the field, the value and the remedy.
    """
    if not isinstance(body, dict):
        raise InputError(f"the body must be a JSON object, got {type(body).__name__}")
    known = {}
    for name, value in body.items():
        if name in _NEUTRAL and name not in kind.model_fields:
            if value is not None and value != _NEUTRAL[name]:
                raise InputError(f"{name}: {value!r} is not served; leave it out")
        else:
            known[name] = value
    return kind.parse(known)
