"""Whether processes have ended, for tests that end them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def dies_with_its_stage(code: str, started: Path) -> bool:
    """Whether a process that `code` starts in a stage, and that writes its number into a file, ends with the stage."""
    stage = subprocess.Popen([sys.executable, "-c", code])
    assert wait_for(lambda: started.exists() and started.read_text())
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    return wait_for(lambda: gone(int(started.read_text())))
