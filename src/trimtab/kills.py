"""Who killed a process: Linux, because memory ran out, or somebody.

Linux counts its own kills: in /proc/vmstat those of the machine, and those of a container's limit also beside that
limit. What kills for memory without being Linux (a watchdog, systemd-oomd) is not told apart from a person.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

from trimtab.errors import Failure, StageError

#: Files that count kills for memory, each in a line "oom_kill N": the kernel's, and cgroups' of version 2 and 1.
COUNTERS = (
    Path("/proc/vmstat"),
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)


def out_of_memory_kills() -> int | None:
    """Returns how many processes were killed because memory ran out, since the machine started.

    It is only good for comparison with an earlier answer; None where nothing counts them.
    """
    found = [int(match[1]) for path in COUNTERS if (match := re.search(r"^oom_kill (\d+)$", _text(path), re.MULTILINE))]
    return sum(found) if found else None


def check(name: str, returncode: int, before: int | None) -> None:
    """Raises what it means that a process ended with SIGKILL; nothing for any other end.

    Where nothing counts kills it is taken for memory, by far the most frequent reason.

    Args:
        name: what the process is called in messages.
        returncode: as `subprocess` has it, or as a shell has it, 128 more than the signal.
        before: `out_of_memory_kills` when the process began.

    Raises:
        Failure: `does_not_fit`, memory ran out.
        StageError: it had not.
    """
    if returncode not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return
    now = out_of_memory_kills()
    if before is None or now is None:
        raise Failure("does_not_fit", f"{name} was killed: it most likely needed more memory than there is")
    if now > before:
        raise Failure("does_not_fit", f"{name} was killed: it needed more memory than there is")
    raise StageError(
        f"{name} was killed by somebody, or by a program that watches this machine, for memory had not run out; run "
        f"the same again, which goes on from the stages that were complete"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
