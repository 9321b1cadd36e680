"""Writes down when requests came and how long they were, and nothing of what they said.

What a line holds is said in `trimtab.serving.request_log`, which reads it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from trimtab.base import progress
from trimtab.base.errors import InputError
from trimtab.runtime.service.paged_engine import GenerationRequest


class Recorder:
    """Appends a line for each answer to a file of this day and server, `<day>-<host>-<process>.jsonl`.

    Several servers may share a folder, and old files may be moved away or removed at any time. Where a line cannot be
    written, the request is answered all the same: `lost` counts it, and the first of a row of them is reported.

    Args:
        folder: is made if it is not there.

    Raises:
        InputError: nothing can be written into it.
    """

    def __init__(self, folder: Path):
        self.folder, self.lost = folder, 0
        self._server = f"{socket.gethostname()}-{os.getpid()}"
        self._failing = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{self._server}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"record: '{folder}' cannot be written ({error.strerror}); choose another") from None

    def record(self, request: GenerationRequest, outcome: str) -> None:
        """Writes the line of an answer that has ended: stop, length, cancelled or failed."""
        now, moment = time.time(), time.monotonic()
        arrived = now - (moment - request.arrived)
        first = {"first_token_seconds": round(request.times[0] - request.arrived, 4)} if request.times else {}
        line = {
            "time": round(arrived, 3),
            "input_tokens": request.prompt_tokens,
            "output_tokens": len(request.new_tokens),
            "seconds": round(moment - request.arrived, 4),
            **first,
            "outcome": outcome,
        }
        day = datetime.fromtimestamp(arrived, UTC).date()
        try:
            _append(self.folder / f"{day}-{self._server}.jsonl", json.dumps(line).encode() + b"\n")
            self._failing = False
        except OSError as error:
            self.lost += 1
            if not self._failing:
                progress.report("serve", f"requests are not recorded: {self.folder}: {error.strerror}")
            self._failing = True


def _append(path: Path, line: bytes) -> None:
    """Writes a whole line or nothing of it."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if os.write(file, line) < len(line):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)
