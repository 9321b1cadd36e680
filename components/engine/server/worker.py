"""Steps an engine in a thread of its own, between the coroutines that ask and those that read.

Only that thread touches the engine's sequences: coroutines put what they want into a queue, and get tokens through
their event loop. A request is accepted when `stream` is entered; from then on it is computed to its end, unless its
reader stops reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from trimtab.base.errors import Failure, StageError
from trimtab.runtime.service.paged_engine import Event, GenerationRequest, PagedEngine

#: Seconds until a batch that waits for more sequences is asked again.
WAIT = 0.002


class Draining(StageError):
    """The server finishes what it has accepted and accepts nothing new."""


class Worker:
    """Computes requests until it is closed.

    Args:
        observe: called in the worker's thread after every step with its events.
    """

    def __init__(self, engine: PagedEngine, observe: Callable[[list[Event]], None] = lambda events: None):
        self.engine, self._observe = engine, observe
        self.accepted = 0
        self.draining = False
        #: Why nothing can be computed any more, once that is so.
        self.broken: Exception | None = None
        self._readers: dict[GenerationRequest, asyncio.Queue] = {}
        self._wishes: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins; to be called in the event loop that reads."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def drained(self) -> bool:
        """Whether nothing more will come: every accepted request has ended and was read."""
        return self.draining and not self._readers

    def drain(self) -> None:
        """Refuses new requests from now on; a static batch no longer waits for them."""
        self.draining = True
        self._wishes.put(("drain", None))

    def close(self) -> None:
        """Ends the thread after its current step."""
        self._wishes.put(("close", None))
        self._thread.join()

    @contextlib.asynccontextmanager
    async def stream(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Accepts a request and gives its events; leaving early cancels it and frees its blocks.

        Raises:
            InputError: it could never be served.
            Draining: nothing new is accepted.
            Failure, or what else the engine raised: it is broken.
        """
        self.engine.check(request)
        if self.draining:
            raise Draining("the server is shutting down; ask another one")
        if self.broken:
            raise self.broken
        events = self._readers[request] = asyncio.Queue()
        self.accepted += 1
        request.arrived = time.monotonic()
        self._wishes.put(("submit", request))
        try:
            yield self._read(request, events)
        finally:
            del self._readers[request]
            self._wishes.put(("cancel", request))  # of one that has ended nothing is left to cancel

    @staticmethod
    async def _read(request: GenerationRequest, events: asyncio.Queue) -> AsyncIterator[Event]:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.last:
                return

    def _work(self) -> None:
        try:
            while self._obey():
                events = self.engine.step()
                if events:
                    self._observe(events)
                    self._deliver(events)
        except Exception as error:  # whatever it is, whoever waits must hear of it
            self.broken = error if isinstance(error, Failure) else StageError(f"the engine failed: {error!r}")
            self._on_loop(self._tell_all, self.broken)
            raise

    def _obey(self) -> bool:
        """Does what was asked for since the last step; waits where there is nothing to compute."""
        scheduler = self.engine.scheduler
        while True:
            try:
                if scheduler.idle:
                    wish, request = self._wishes.get()
                elif not scheduler.running and not scheduler.draining and scheduler.strategy != "in-flight":
                    wish, request = self._wishes.get(timeout=WAIT)
                else:
                    wish, request = self._wishes.get_nowait()
            except queue.Empty:
                return True
            if wish == "close":
                return False
            if wish == "drain":
                scheduler.draining = True
            elif wish == "submit":
                scheduler.submit(request)
            elif not request.finish_reason:
                self.engine.cancel(request)

    def _deliver(self, events: list[Event]) -> None:
        self._on_loop(self._hand_out, events)

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            if event.request in self._readers:  # else its reader has gone
                self._readers[event.request].put_nowait(event)

    def _tell_all(self, error: Exception) -> None:
        for events in self._readers.values():
            events.put_nowait(error)

    def _on_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all readers
            self._loop.call_soon_threadsafe(call, *arguments)
