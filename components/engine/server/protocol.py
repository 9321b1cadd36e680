"""OpenAI's requests and answers, as far as they are served; what would change an answer and is not, is refused.

Source: the reference of OpenAI's API, /v1/completions and /v1/chat/completions. `ignore_eos` is vLLM's, for measuring.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import Field

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.runtime.service.sampling import Chosen, Sampling

#: Answers of one request at most: prompts times `n`.
MAX_CHOICES = 128
#: Fields that are accepted with the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None,
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": [],
}  # fmt: skip


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

    def prompts(self) -> list[str | list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def most(self) -> int | None:
        return self.max_tokens


class Message(Document):
    """A turn of a conversation; of parts only text is understood."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Returns role and content as a chat template takes them.

        Raises:
            InputError: a part that is not text.
        """
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"messages.content: a part of type {part.get('type')!r} is not served; write 'text'")
        return {"role": self.role, "content": "".join(part["text"] for part in self.content)}


class Chat(_Generation):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


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


class Answer:
    """Makes the bodies of one request's answers: `whole` for all at once, `chunk` for a stream."""

    def __init__(self, chat: bool, model: str):
        self.chat = chat
        self.identity = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self.identity, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **({"usage": usage} if usage else {})}

    def choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Any = None, stream: bool = False
    ) -> dict[str, Any]:
        """One choice of `whole`, or its next part in a stream."""
        about = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        if not self.chat:
            return {**about, "text": text}
        if stream:
            return {**about, "delta": {"content": text} if text or not finish_reason else {}}
        return {**about, "message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, chosen: list[Chosen], tokenizer: Any) -> dict[str, Any]:
        """The log-probabilities of tokens, in the form of the interface."""

        def name(token: int) -> str:
            return tokenizer.decode([token])

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": name(token), "logprob": logprob, "bytes": list(name(token).encode())}

        if self.chat:
            content = [
                {**entry(c.token, c.logprob), "top_logprobs": [entry(*item) for item in c.top]} for c in chosen
            ]
            return {"content": content, "refusal": None}
        offsets, length = [], 0
        for item in chosen:
            offsets.append(length)
            length += len(name(item.token))
        return {
            "tokens": [name(c.token) for c in chosen],
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{name(token): logprob for token, logprob in c.top} for c in chosen],
            "text_offset": offsets,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
