"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trimtab.base.errors import InputError, TrimtabError
from trimtab.components.engine.server import protocol
from trimtab.components.engine.server.metrics import Metrics
from trimtab.components.engine.server.protocol import Answer, Chat, Completion
from trimtab.components.engine.server.recorder import Recorder
from trimtab.components.engine.server.text_stream import TextStream
from trimtab.components.engine.server.worker import Worker
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine
from trimtab.runtime.service.sampling import Chosen
from trimtab.runtime.text.token_windows import encode

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
        self._tokenizing = asyncio.Lock()  # a fast tokenizer may not be entered twice
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/v1/completions", self._answers(Completion), methods=["POST"]),
            Route("/v1/chat/completions", self._answers(Chat), methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
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
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _one_model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["model"])
        return JSONResponse(self._about())

    async def _health(self, http: HttpRequest) -> Response:
        worker = self.worker
        status = f"broken: {worker.broken}" if worker.broken else "draining" if worker.draining else "ok"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _answers(self, kind: type[Completion | Chat]) -> Callable[[HttpRequest], Any]:
        async def route(http: HttpRequest) -> Response:
            try:
                asked = protocol.parse(kind, await _json(http))
                self._check_model(asked.model)
                requests = await self._requests(asked)
                for request in requests:  # all or none: a stream that has begun can no longer be refused
                    self.engine.check(request)
            except InputError as error:
                raise _invalid(error) from None
            if self.worker.draining:
                raise Refused(503, protocol.error("the server is shutting down; ask another one", "server_error"))
            if self.worker.broken:
                raise Refused(503, protocol.error(str(self.worker.broken), "server_error"))
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
            raise Refused(503, protocol.error(str(error), "server_error")) from None
        choices = []
        for index, some in enumerate(parts):
            chosen = [c for part in some for c in part.chosen]
            logprobs = answer.logprobs(chosen, self.tokenizer) if asked.told is not None else None
            text = "".join(part.text for part in some)
            choices.append(answer.choice(index, text, some[-1].finish_reason, logprobs))
        return JSONResponse(answer.whole(choices, _usage(asked, requests)))

    async def _stream(self, asked: Any, requests: list[GenerationRequest], answer: Answer) -> AsyncIterator[str]:
        if answer.chat:
            for index in range(len(requests)):
                role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _line(answer.chunk([role]))
        try:
            async with contextlib.aclosing(self._parts(asked, requests)) as found:
                async for part in found:
                    told = asked.told is not None and part.chosen
                    logprobs = answer.logprobs(part.chosen, self.tokenizer) if told else None
                    choice = answer.choice(part.index, part.text, part.finish_reason, logprobs, stream=True)
                    yield _line(answer.chunk([choice]))
            if asked.includes_usage:
                yield _line(answer.chunk([], _usage(asked, requests)))
        except TrimtabError as error:
            yield _line(protocol.error(str(error), "server_error"))
        yield "data: [DONE]\n\n"

    async def _parts(self, asked: Any, requests: list[GenerationRequest]) -> AsyncIterator[_Part]:
        """Yields the parts of all choices as they come; leaving early cancels what still runs."""
        parts: asyncio.Queue = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._follow(index, request, asked.stops, parts))
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

    async def _follow(self, index: int, request: GenerationRequest, stops: list[str], parts: asyncio.Queue) -> None:
        """Puts the parts of one choice into a queue, the last with its `finish_reason`, or the exception."""
        outcome, accepted = "cancelled", False
        try:
            async with self.worker.stream(request) as events:
                self.metrics.accepted(request)
                accepted = True
                text, untold = TextStream(self.tokenizer, stops), []
                async for event in events:
                    new = text.push(event.chosen.token) if event.chosen else ""
                    untold += [event.chosen] if event.chosen else []
                    if event.last or text.stopped:
                        new += text.finish()
                        outcome = "stop" if text.stopped else request.finish_reason
                        break
                    if new:
                        parts.put_nowait(_Part(index, new, untold))
                        untold = []
            parts.put_nowait(_Part(index, new, untold, outcome))
        except TrimtabError as error:
            outcome = "failed"
            parts.put_nowait(error)
        finally:
            self.metrics.ended(request, outcome)
            if self.recorder and accepted:
                self.recorder.record(request, outcome)

    # --------------------------------------------------------------------------------------------------- questions

    async def _requests(self, asked: Completion | Chat) -> list[GenerationRequest]:
        """Returns a request for each choice, prompt by prompt.

        Raises:
            InputError: too many of them, or no chat template.
        """
        prompts = asked.prompts() if isinstance(asked, Completion) else [self._dialogue(asked)]
        if len(prompts) * asked.n > protocol.MAX_CHOICES:
            many = f"{len(prompts)} prompts times n {asked.n}"
            raise InputError(f"prompt: {many} are more than {protocol.MAX_CHOICES} answers; ask for fewer at once")
        made = []
        for prompt in prompts:
            tokens = prompt if isinstance(prompt, list) else await self._tokens(prompt, chat=isinstance(asked, Chat))
            most = asked.most or max(1, self.engine.settings.max_seq_len - len(tokens))
            for _ in range(asked.n):
                sampling = asked.sampling(len(made), asked.told)
                made.append(GenerationRequest(list(tokens), most, sampling=sampling, ignore_eos=asked.ignore_eos))
        return made

    def _dialogue(self, asked: Chat) -> str:
        if not self.tokenizer.chat_template:
            raise InputError("messages: the model has no chat template; use /v1/completions")
        messages = [message.plain() for message in asked.messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, such as on two turns of one role
            raise InputError(f"messages: the model's chat template refuses them: {error}") from None

    async def _tokens(self, text: str, chat: bool) -> list[int]:
        """Tokenises in another thread: a long text takes longer than the others should wait."""
        async with self._tokenizing:  # a template writes the special tokens itself
            return await asyncio.to_thread(encode, self.tokenizer, text, not chat)

    def _check_model(self, name: str) -> None:
        if name and name != self.model:
            message = f"model: '{name}' is not served here; write '{self.model}'"
            raise Refused(404, protocol.error(message, "invalid_request_error", "model", "model_not_found"))

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


class _Part:
    """The next text of a choice, with the tokens that it is made of; the last part has a `finish_reason`."""

    def __init__(self, index: int, text: str, chosen: list[Chosen], finish_reason: str | None = None):
        self.index, self.text, self.chosen, self.finish_reason = index, text, chosen, finish_reason


def _usage(asked: Any, requests: list[GenerationRequest]) -> dict[str, int]:
    """A prompt counts once, however many answers it gets."""
    prompts = sum(request.prompt_tokens for request in requests[:: asked.n])
    return protocol.usage(prompts, sum(len(request.new_tokens) for request in requests))


async def _json(http: HttpRequest) -> Any:
    """Reads a body that may be at most MAX_BODY bytes long."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY:
            message = f"the body has more than {MAX_BODY} bytes; send less"
            raise Refused(413, protocol.error(message, "invalid_request_error"))
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
    return Refused(400, protocol.error(message, "invalid_request_error", param, code))


async def _refusal(http: HttpRequest, refused: Exception) -> Response:
    headers = {"Retry-After": "5"} if refused.status == 503 else None
    return JSONResponse(refused.body, status_code=refused.status, headers=headers)


async def _no_route(http: HttpRequest, error: Any) -> Response:
    message = f"{http.method} {http.url.path} is not served; see /v1/models, /v1/completions, /v1/chat/completions"
    return JSONResponse(protocol.error(message, "invalid_request_error"), status_code=error.status_code)


async def _defect(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(protocol.error(f"a defect in trimtab: {error!r}", "server_error"), status_code=500)


