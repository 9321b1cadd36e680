"""The bodies of answers, in OpenAI's form: all at once, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from trimtab.components.engine.server.token_text import token_bytes, token_name
from trimtab.components.engine.server.tool_calls import ToolCall
from trimtab.runtime.service.sampling import Chosen

#: What stands for a log-probability that JSON cannot write, as other servers do.
LEAST_LOGPROB = -9999.0


class Json(JSONResponse):
    """A JSON body in ASCII: a client's own half characters may stand in a message."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Answer:
    """Makes the bodies of one request's answers: `whole` for all at once, `chunk` for a stream."""

    def __init__(self, chat: bool, model: str):
        self.chat = chat
        self.identity = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self.identity, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None, told: bool = False
    ) -> dict[str, Any]:
        """A part of a stream; `told` where its end will have the usage, which is null until then."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **({"usage": usage} if told else {})}

    def choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Any = None, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """One choice of `whole`."""
        about = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        if not self.chat:
            return {**about, "text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.said() for call in calls]}
        return {**about, "message": message}

    def delta(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: Any = None,
        calls: Sequence[tuple[int, ToolCall]] = (),
    ) -> dict[str, Any]:
        """The next part of a choice in a stream; each call comes whole, with its number."""
        about = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        if not self.chat:
            return {**about, "text": text}
        delta: dict[str, Any] = {"content": text} if text or not (finish_reason or calls) else {}
        if calls:
            delta["tool_calls"] = [{"index": number, **call.said()} for number, call in calls]
        return {**about, "delta": delta}

    def logprobs(self, chosen: list[Chosen], tokenizer: Any, offset: int = 0) -> dict[str, Any]:
        """The log-probabilities of tokens; `offset` characters of the text came before the first of them."""

        def name(token: int) -> str:
            return token_name(tokenizer, token)

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": name(token), "logprob": finite(logprob), "bytes": list(token_bytes(tokenizer, token))}

        if self.chat:
            content = [{**entry(c.token, c.logprob), "top_logprobs": [entry(*item) for item in c.top]} for c in chosen]
            return {"content": content, "refusal": None}
        offsets = []
        for item in chosen:
            offsets.append(offset)
            offset += len(tokenizer.decode([item.token]))
        return {
            "tokens": [name(c.token) for c in chosen],
            "token_logprobs": [finite(c.logprob) for c in chosen],
            "top_logprobs": [_likeliest(c, name) for c in chosen],
            "text_offset": offsets,
        }


def _likeliest(chosen: Chosen, name: Any) -> dict[str, float] | None:
    """The likeliest tokens by their texts, of two with one text the likelier; None of a text's first token."""
    if chosen.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in chosen.top:  # the likeliest first
        found.setdefault(name(token), finite(logprob))
    return found


def finite(logprob: float | None) -> float | None:
    """Returns a log-probability that JSON can write."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
