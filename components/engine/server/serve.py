"""Runs the server until it is told to end: SIGTERM lets it finish what it has accepted, a second one does not."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from types import FrameType

import uvicorn

from trimtab.base import progress
from trimtab.base.errors import InputError
from trimtab.components.engine.server.app import Server
from trimtab.components.engine.server.recorder import Recorder
from trimtab.recipe import Engine as Settings
from trimtab.runtime.service.paged_engine import PagedEngine
from trimtab.runtime.service.scheduler import Strategy


class _Draining(uvicorn.Server):
    """uvicorn would close its door at once; clients shall hear 503 and come back elsewhere until all is finished."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT or self._server.worker.draining:
            self.should_exit, self.force_exit = True, self._server.worker.draining
        self._server.worker.drain()

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self._server.worker.drained
        return await super().on_tick(counter)


def main(
    folder: Path,
    name: str,
    settings: Settings,
    device: str,
    strategy: Strategy,
    host: str,
    port: int,
    record: Path | None = None,
) -> None:
    """Loads an artifact and serves it until SIGTERM or an interrupt.

    Args:
        record: a folder for the log of requests; None for no log.

    Raises:
        InputError: not a model, settings that fit no sequence, an address that cannot be listened on, or a folder that
            cannot be written.
        Failure: `unsupported`, `export_damaged` or `does_not_fit`.
    """
    listening = _listen(host, port)  # before minutes of loading
    recorder = Recorder(record) if record else None
    progress.report("serve", f"loading {folder}")
    engine = PagedEngine(folder, settings, device, strategy=strategy)
    engine.probe()
    if engine.attention_path == "kernel":
        progress.report("serve", "recording the usual steps")  # else the first clients would wait for it
        engine.warm_up(settings.max_seq_len)
    server = Server(engine, name, recorder)
    host, port = listening.getsockname()[:2]
    cache = f"{engine.pool.blocks * engine.pool.block_size:,} tokens of KV cache in {engine.cache.storage}"
    progress.report("serve", f"{name} on http://{host}:{port}/v1, {engine.device}, {cache}, {strategy} batching")
    _Draining(configuration(server), server).run(sockets=[listening])


def configuration(server: Server) -> uvicorn.Config:
    """How uvicorn runs a server."""
    return uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="on")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"host and port: {host}:{port} cannot be listened on: {error}; choose another") from None
