"""A server on a real socket, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from trimtab.components.engine.server.app import Server
from trimtab.components.engine.server.serve import configuration
from trimtab.recipe import Engine as Settings
from trimtab.runtime.service.paged_engine import PagedEngine

SETTINGS = Settings(max_seq_len=512, max_num_tokens=64, max_batch_size=8, enable_chunked_prefill=True)


@dataclass(frozen=True)
class Running:
    server: Server
    url: str

    def wait_until_idle(self, seconds: float = 10) -> bool:
        """Whether nothing is computed and no block is owned, soon."""
        engine, end = self.server.engine, time.monotonic() + seconds
        while not (engine.scheduler.idle and engine.pool.used == 0) and time.monotonic() < end:
            time.sleep(0.01)
        return engine.scheduler.idle and engine.pool.used == 0


@contextmanager
def serving(model: Path, settings: Settings = SETTINGS) -> Iterator[Running]:
    """Serves a model as "tiny" while the body runs."""
    server = Server(PagedEngine(model, settings, "cpu"), "tiny")
    web = uvicorn.Server(configuration(server))
    web.config.port = 0
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    port = web.servers[0].sockets[0].getsockname()[1]
    yield Running(server, f"http://127.0.0.1:{port}")
    web.should_exit = True
    thread.join()
