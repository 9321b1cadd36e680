"""One of the processes of `runtime.engines.parallel`: `torchrun ... -m trimtab.runtime.engines.rank REQUEST`.

Answers calls as they come, JSON in and out over a local socket, until it is told to end or nobody is left to ask.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch

from trimtab.base import child
from trimtab.recipe import Engine as Settings
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.parallel import shards, torchrun


def main(request: dict[str, Any]) -> None:
    """Opens this rank's part of an engine and serves it.

    Args:
        request: folder, settings (of a recipe), kv_cache, and the address of who asks.
    """
    child.die_with(os.getppid())
    child.follow_run()
    with Client(request["address"]) as connection, torchrun.joined():
        engine: TorchEngine | None = None

        def load() -> None:
            nonlocal engine
            settings = Settings.model_validate(request["settings"])
            device = "cuda" if torch.cuda.is_available() else "cpu"
            place = shards.place(settings, torch.device(device))
            engine = TorchEngine(Path(request["folder"]), settings, device, request["kv_cache"], place)

        _send(connection, child.outcome("loading", load))
        while (call := _receive(connection)) is not None:
            _send(connection, child.outcome(call[0], lambda call=call: _answer(engine, *call)))


def _answer(engine: TorchEngine, name: str, arguments: list[Any]) -> Any:
    if name in ("nll", "predict"):
        arguments = [torch.tensor(arguments[0]), *arguments[1:]]
    found = getattr(engine, name)
    return found(*arguments) if callable(found) else found


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps({"rank": torchrun.rank(), **answer}).encode())


def _receive(connection: Connection) -> list[Any] | None:
    """Returns the name and arguments of the next call, None at the end."""
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):  # who asked is gone
        return None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
