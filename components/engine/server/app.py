"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics, /openapi.json."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from trimtab.base.errors import InputError, TrimtabError
from trimtab.components.engine.server import answers, openapi, protocol
from trimtab.components.engine.server.answers import Answer, Json
from trimtab.components.engine.server.metrics import Metrics
from trimtab.components.engine.server.protocol import Chat, Completion
from trimtab.components.engine.server.questions import Questions
from trimtab.components.engine.server.recorder import Recorder
from trimtab.components.engine.server.text_stream import TextStream
from trimtab.components.engine.server.tool_calls import CallReader, ToolCall
from trimtab.components.engine.server.worker import Worker
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine
from trimtab.runtime.service.sampling import Chosen

#: Bytes of a request's body at most: a prompt of a million tokens.
MAX_BODY = 4 << 20


class Refused(Exception):
    """A request that is answered by an error: its HTTP status and its body."""

    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(body["error"]["message"])
        self.status, self.body = status, body


class Server:
    """Answers HTTP requests from one engine; `app` is the ASGI application, `worker` what computes.

    Args:
        model: the name that clients write; others are unknown.
        recorder: writes down when answers were asked for and how long they were; None writes nothing.
    """

    def __init__(self, engine: PagedEngine, model: str, recorder: Recorder | None = None):
        self.engine, self.model, self.recorder = engine, model, recorder
        self.tokenizer = engine.tokenizer
        self.metrics = Metrics(engine, recorder)
        self.worker = Worker(engine, self.metrics.observe)
        self._started = int(time.time())
        self.questions = Questions(self.tokenizer, engine.settings.max_seq_len)
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/v1/completions", self._answers(Completion), methods=["POST"]),
            Route("/v1/chat/completions", self._answers(Chat), methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        handlers = {Refused: _refusal, 404: _no_route, 405: _no_route, Exception: _defect}
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.close)

    # ------------------------------------------------------------------------------------------------------ routes

    async def _models(self, http: HttpRequest) -> Response:
        return Json({"object": "list", "data": [self._about()]})

    async def _one_model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["model"])
        return Json(self._about())

    async def _health(self, http: HttpRequest) -> Response:
        worker = self.worker
        status = f"broken: {worker.broken}" if worker.broken else "draining" if worker.draining else "ok"
        return Json({"status": status}, status_code=200 if status == "ok" else 503)

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, http: HttpRequest) -> Response:
        return Json(openapi.document())

    def _answers(self, kind: type[Completion | Chat]) -> Callable[[HttpRequest], Any]:
        async def route(http: HttpRequest) -> Response:
            try:
                asked = protocol.parse(kind, await _json(http))
                self._check_model(asked.model)
                requests = await self.questions.requests(asked)
                for request in requests:  # all or none: a stream that has begun can no longer be refused
                    self.engine.check(request)
            except InputError as error:
                raise _invalid(error) from None
            if self.worker.draining:
                raise Refused(503, answers.error("the server is shutting down; ask another one", "server_error"))
            if self.worker.broken:
                raise Refused(503, answers.error(str(self.worker.broken), "server_error"))
            answer = Answer(kind is Chat, self.model)
            if asked.stream:
                return _Events(self._stream(asked, requests, answer), media_type="text/event-stream")
            return await _unless_gone(http, self._whole(asked, requests, answer))

        return route

    # ----------------------------------------------------------------------------------------------------- answers

    async def _whole(self, asked: Any, requests: list[GenerationRequest], answer: Answer) -> Response:
        parts: list[list[_Part]] = [[] for _ in requests]
        try:
            async with contextlib.aclosing(self._parts(asked, requests)) as found:
                async for part in found:
                    parts[part.index].append(part)
        except TrimtabError as error:
            raise Refused(503, answers.error(str(error), "server_error")) from None
        choices = []
        for index, some in enumerate(parts):
            chosen = [c for part in some for c in part.chosen]
            logprobs = answer.logprobs(chosen, self.tokenizer) if asked.told is not None else None
            text, calls = "".join(part.text for part in some), [call for part in some for call in part.calls]
            choices.append(answer.choice(index, text, some[-1].finish_reason, logprobs, calls))
        return Json(answer.whole(choices, _usage(asked, requests)))

    async def _stream(self, asked: Any, requests: list[GenerationRequest], answer: Answer) -> AsyncIterator[str]:
        told = asked.includes_usage
        if answer.chat:
            for index in range(len(requests)):
                role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _line(answer.chunk([role], told=told))
        offsets, called = [0] * len(requests), [0] * len(requests)
        try:
            async with contextlib.aclosing(self._parts(asked, requests)) as found:
                async for part in found:
                    logprobs = None
                    if asked.told is not None and part.chosen:
                        logprobs = answer.logprobs(part.chosen, self.tokenizer, offsets[part.index])
                        offsets[part.index] += sum(len(self.tokenizer.decode([c.token])) for c in part.chosen)
                    calls = list(enumerate(part.calls, start=called[part.index]))
                    called[part.index] += len(calls)
                    delta = answer.delta(part.index, part.text, part.finish_reason, logprobs, calls)
                    yield _line(answer.chunk([delta], told=told))
            if told:
                yield _line(answer.chunk([], _usage(asked, requests), told=True))
        except TrimtabError as error:
            yield _line(answers.error(str(error), "server_error"))
        yield "data: [DONE]\n\n"

    async def _parts(self, asked: Any, requests: list[GenerationRequest]) -> AsyncIterator[_Part]:
        """Yields the parts of all choices as they come; leaving early cancels what still runs."""
        parts: asyncio.Queue = asyncio.Queue()
        echoed = self.questions.prompt_texts(asked, requests)
        tasks = [
            asyncio.create_task(self._follow(index, request, asked, echoed[index], parts))
            for index, request in enumerate(requests)
        ]
        try:
            left = len(tasks)
            while left:
                part = await parts.get()
                if isinstance(part, Exception):
                    raise part
                yield part
                left -= part.finish_reason is not None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(
        self, index: int, request: GenerationRequest, asked: Any, echoed: str, parts: asyncio.Queue
    ) -> None:
        """Puts the parts of one choice into a queue, the last with its `finish_reason`, or the exception."""
        outcome, accepted, called = "cancelled", False, False
        calls: list[ToolCall] = []
        reader = self._reader(asked)
        try:
            async with self.worker.stream(request) as events:
                self.metrics.accepted(request)
                accepted = True
                text, untold, is_first = TextStream(self.tokenizer, asked.stops), [], True
                async for event in events:
                    if asked.echoes and is_first:  # by now the prompt was read
                        parts.put_nowait(_Part(index, echoed, _prompt(request)))
                    is_first = False
                    new = text.push(event.chosen.token) if event.chosen else ""
                    untold += [event.chosen] if event.chosen else []
                    ends = event.last or text.stopped
                    new += text.finish() if ends else ""
                    if reader:
                        new, calls = reader.push(new)
                        if ends:
                            rest, more = reader.finish()
                            new, calls = new + rest, calls + more
                        called |= bool(calls)
                    if ends:
                        outcome = "stop" if text.stopped else request.finish_reason
                        break
                    if new or calls:
                        parts.put_nowait(_Part(index, new, untold, calls=calls))
                        untold = []
            parts.put_nowait(_Part(index, new, untold, "tool_calls" if called else outcome, calls))
        except TrimtabError as error:
            outcome = "failed"
            parts.put_nowait(error)
        finally:
            self.metrics.ended(request, outcome)
            if self.recorder and accepted:
                self.recorder.record(request, outcome)

    def _reader(self, asked: Any) -> CallReader | None:
        """Returns what finds the calls in an answer to a request that offers tools."""
        if not (isinstance(asked, Chat) and asked.offered):
            return None
        names = [tool.function.name for tool in asked.offered]
        return CallReader(self.questions.tools, names, 1 if asked.parallel_tool_calls is False else None)

    # --------------------------------------------------------------------------------------------------- questions

    def _check_model(self, name: str) -> None:
        if name and name != self.model:
            message = f"model: '{name}' is not served here; write '{self.model}'"
            raise Refused(404, answers.error(message, "invalid_request_error", "model", "model_not_found"))

    def _about(self) -> dict[str, Any]:
        length = self.engine.settings.max_seq_len
        about = {"id": self.model, "object": "model", "created": self._started, "owned_by": "trimtab"}
        return {**about, "max_model_len": length}


class _Events(StreamingResponse):
    """A stream whose source is closed with it: a client that has gone leaves nothing that computes for it."""

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            await self.body_iterator.aclose()


@dataclass
class _Part:
    """The next text of a choice, the tokens that it is made of, and the calls in it; the last has a `finish_reason`."""

    index: int
    text: str
    chosen: list[Chosen]
    finish_reason: str | None = None
    calls: list[ToolCall] = field(default_factory=list)


def _prompt(request: GenerationRequest) -> list[Chosen]:
    """Returns the tokens of a prompt, those but the first with how likely they were where that was asked for."""
    if request.prompt_logprobs is None:
        return []
    first, *rest = request.tokens[: request.prompt_tokens]
    return [Chosen(first), *(request.prompt_told[place] for place in range(1, len(rest) + 1))]


def _usage(asked: Any, requests: list[GenerationRequest]) -> dict[str, int]:
    """A prompt counts once, however many answers it gets."""
    prompts = sum(request.prompt_tokens for request in requests[:: asked.n])
    return answers.usage(prompts, sum(len(request.new_tokens) for request in requests))


async def _json(http: HttpRequest) -> Any:
    """Reads a body that may be at most MAX_BODY bytes long."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY:
            message = f"the body has more than {MAX_BODY} bytes; send less"
            raise Refused(413, answers.error(message, "invalid_request_error"))
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None


async def _unless_gone(http: HttpRequest, work: Any) -> Response:
    """Awaits a response, but no longer than its client: a client that has gone leaves nothing that computes for it."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _line(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _invalid(error: InputError) -> Refused:
    message = str(error)
    field = message.partition(":")[0]
    code = "context_length_exceeded" if "exceed" in message else None
    param = field if field.replace("_", "").replace(".", "").isalnum() else None
    return Refused(400, answers.error(message, "invalid_request_error", param, code))


async def _refusal(http: HttpRequest, refused: Exception) -> Response:
    headers = {"Retry-After": "5"} if refused.status == 503 else None
    return Json(refused.body, status_code=refused.status, headers=headers)


async def _no_route(http: HttpRequest, error: Any) -> Response:
    message = f"{http.method} {http.url.path} is not served; see /v1/models, /v1/completions, /v1/chat/completions"
    return Json(answers.error(message, "invalid_request_error"), status_code=error.status_code, headers=error.headers)


async def _defect(http: HttpRequest, error: Exception) -> Response:
    return Json(answers.error(f"a defect in trimtab: {error!r}", "server_error"), status_code=500)
