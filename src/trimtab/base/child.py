"""Runs a stage's work in a process of its own.

Three reasons: work that is killed for memory leaves its stage alive to say so; validation sees only what is on
disk; and a stage that has nothing to do never imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.base import errors, kills, transient
from trimtab.base.errors import Failure, StageError, TrimtabError

#: Set by the command line to its own process id: stages end when it is gone, also after a SIGKILL.
RUN_PID = "TRIMTAB_RUN_PID"


@dataclass(frozen=True)
class Done:
    """What the work returned, the seconds it took and the largest resident memory of its process in bytes."""

    value: Any
    seconds: float
    peak_memory_bytes: int


def call(work: str, *, time_limit: float | None = None, **arguments: Any) -> Done:
    """Calls "package.module:function" in a child process with JSON arguments and returns its JSON result.

    Args:
        time_limit: seconds after which the child, and whatever it started, is killed.

    Raises:
        Failure: the work raised one, or ran out of memory (`does_not_fit`).
        TrimtabError: the work raised one of these.
        Transient: any other exception that another try may not meet.
        StageError: any other exception, of which the traceback is in the log; it was killed while there was memory; or
            the time limit was reached.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        answer = Path(folder) / "answer.json"
        request = {"work": work, "arguments": arguments, "answer": str(answer), "parent": os.getpid()}
        command = [sys.executable, "-m", "trimtab.base.child"]
        process = run_limited(command, work.rpartition(":")[2], time_limit, input=json.dumps(request))
        if not answer.exists():
            raise StageError(
                f"{work} ended with exit code {process.returncode} and no answer; see its log above"
            )
        return done(json.loads(answer.read_text(encoding="utf-8")))


def done(answer: dict[str, Any]) -> Done:
    """Returns what an answer of `answer_of` says, or raises what it says.

    Raises:
        Failure, TrimtabError: as `call`.
    """
    if "failure" in answer:
        raise Failure(*answer["failure"])
    if "error" in answer:
        name, message = answer["error"]
        raise getattr(errors, name, StageError)(message)
    return Done(answer["value"], answer["seconds"], answer["peak_memory_bytes"])


def run_limited(
    command: list[str], name: str, time_limit: float | None, input: str | None = None, log: Path | None = None
) -> subprocess.CompletedProcess:
    """Runs a command; past the time limit, in seconds, kills it together with the processes that it started.

    What it prints goes to where this process prints, or into the file `log`.

    Raises:
        Failure: `does_not_fit`, it was killed because memory ran out; calls the command `name`.
        StageError: it was killed for another reason, or the time limit was reached.
    """
    killed_before = kills.out_of_memory_kills()
    # A session of its own makes a group to kill; without a limit Ctrl+C must reach the child.
    with contextlib.ExitStack() as files:
        output = files.enter_context(log.open("wb")) if log else None
        pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT if log else None}
        process = subprocess.Popen(command, text=True, start_new_session=time_limit is not None, **pipes)
    try:
        process.communicate(input, timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise StageError(f"{name} was not done after {time_limit:g} s and was ended; see its log above") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if time_limit is not None else process.kill()
            process.wait()
    kills.check(name, process.returncode, killed_before)
    return subprocess.CompletedProcess(command, process.returncode)


def follow_run() -> None:
    """Ends this process soon after the run that started it: an orphan would compete with the run's successor."""
    pid = os.environ.get(RUN_PID)
    if not pid:
        return

    def watch() -> None:
        while Path(f"/proc/{pid}").exists():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent dies; elsewhere `follow_run` must do."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def answer_of(work: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Calls "package.module:function" here and returns its result, or how it failed, as JSON that `done` reads."""
    module, _, function = work.partition(":")
    return outcome(function, lambda: getattr(importlib.import_module(module), function)(**arguments))


def outcome(name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Returns what a call returns, or how it failed, as `answer_of` does; messages call it `name`.

    The peak memory is that of this process, or of the largest that it started and waited for.
    """
    started = time.monotonic()
    try:
        value = work()
    except Failure as failure:
        return {"failure": [failure.failure_class, failure.reason]}
    except TrimtabError as error:
        return {"error": [type(error).__name__, str(error)]}
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            first_line = str(error).strip().partition("\n")[0]
            return {"failure": ["does_not_fit", f"{name} ran out of memory: {first_line}"]}
        kind = "Transient" if transient.passes(error) else "StageError"
        return {"error": [kind, f"{name}: {type(error).__name__}: {error}"]}
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"value": value, "seconds": time.monotonic() - started, "peak_memory_bytes": largest * 1024}


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it in three ways: torch.OutOfMemoryError, a CPU allocator's RuntimeError, a CUDA one's."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )


def _main() -> None:
    request = json.load(sys.stdin)
    die_with(request["parent"])
    answer = answer_of(request["work"], request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _main()
