"""Runs a stage's work in a process of its own.

Three reasons: work that is killed for memory leaves its stage alive to say so; validation sees only what is on
disk; and a stage that has nothing to do never imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.base import errors, kills, transient
from trimtab.base.errors import Failure, StageError, TrimtabError

#: Set by the command line to its own process id: stages end when it is gone, also after a SIGKILL.
RUN_PID = "TRIMTAB_RUN_PID"
#: Set by the command line: the socket at which `trimtab.base.fork_server` serves this run.
FORK_SERVER = "TRIMTAB_FORK_SERVER"
#: Set by the command line: modules that the server imports while the first child works, separated by commas.
IMPORTS_AHEAD = "TRIMTAB_IMPORTS_AHEAD"
#: How often a thread of OpenMP asks whether the others are done, before it sleeps. Beside a busy process threads wait
#: long for one that has no processor, and by asking keep it from that one: with libgomp's own number products of few
#: rows took 3.8 times as long beside one busy process on two processors, with this one 2.1 times; alone, no longer.
_SPINS = {"GOMP_SPINCOUNT": "1000"}
#: What that server answers to a client whose libraries would be imported under another environment, or whose fork could
#: not use the GPU.
DECLINED = b"declined"


@dataclass(frozen=True)
class Done:
    """What the work returned, the seconds it took, the largest resident memory of its process in bytes, the seconds of
    all cores together, and the most bytes that PyTorch had of a GPU's memory."""

    value: Any
    seconds: float
    peak_memory_bytes: int
    cpu_seconds: float = 0.0
    peak_gpu_bytes: int = 0


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
        request = {"work": work, "arguments": arguments, "answer": str(answer)}
        code = forked(request, os.environ.get(FORK_SERVER)) if time_limit is None else None
        if code is None:
            command = [sys.executable, "-m", "trimtab.base.child", str(os.getpid())]
            name = work.rpartition(":")[2]
            code = run_limited(command, name, time_limit, input=json.dumps(request)).returncode
        if not answer.exists():
            raise StageError(f"{work} ended with exit code {code} and no answer; see its log above")
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
    told = {name: answer.get(name, 0) for name in ("cpu_seconds", "peak_gpu_bytes")}
    return Done(answer["value"], answer["seconds"], answer["peak_memory_bytes"], **told)


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
        apart = {"start_new_session": time_limit is not None, "env": environment()}
        process = subprocess.Popen(command, text=True, **apart, **pipes)
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


def forked(request: dict[str, Any], path: str | None, streams: tuple[int, int] = (1, 2)) -> int | None:
    """Works on a request in a fork of the server at a path; returns its exit code, or None where there is no server.

    A child that imports what no child before it did takes as long as a new process.

    Args:
        request: work, arguments, and where the answer is written.
        streams: the descriptors of its standard output and error.

    Raises:
        Failure, StageError: as `run_limited`.
    """
    if not path or sys.platform != "linux":
        return None
    killed_before = kills.out_of_memory_kills()
    with socket.socket(socket.AF_UNIX) as connection:
        if not _connected(connection, path):
            return None
        whole = {
            **request,
            "environment": environment(),
            "environment_of_imports": environment_of_imports(),
            "directory": os.getcwd(),
        }
        line = json.dumps(whole).encode() + b"\n"
        try:
            socket.send_fds(connection, [line[:1]], streams)
            connection.sendall(line[1:])
            found = connection.recv(64)
        except ConnectionError:
            found = b""
    if found == DECLINED:
        return None
    code = int(found or -signal.SIGKILL)  # without a word, it was killed together with its server
    kills.check(request["work"].rpartition(":")[2], code, killed_before)
    return code


def serve_forks(path: str) -> None:
    """Starts a server at a path, with this process's environment, where it can serve."""
    if sys.platform == "linux":
        with socket.socket(socket.AF_UNIX) as connection:
            _connected(connection, path)


def _connected(connection: socket.socket, path: str) -> bool:
    """Connects to the server at a path, and starts one where there is none; says whether it could."""
    command = [sys.executable, "-m", "trimtab.base.fork_server", path]
    nowhere = subprocess.DEVNULL  # a stage's own output ends with the stage, and must not be held open
    server = None
    for _ in range(500):
        try:
            connection.connect(path)
            return True
        except ConnectionRefusedError:  # one that was killed
            Path(path).unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        if server is None:
            if not Path(path).parent.exists():
                return False
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), nowhere)
            server = subprocess.Popen(command, env=environment(), **streams)
        elif server.poll() is not None:
            return False
        time.sleep(0.02)
    return False


def environment() -> dict[str, str]:
    """Returns the environment of a process that computes: this one's, and how its threads wait where nothing says so.

    Without what a C library has set, as readline does, which stands in the process's environment and not in os.environ.
    """
    return {**_SPINS, **os.environ}


def environment_of_imports() -> dict[str, str]:
    """Returns that environment without trimtab's own variables: what it says, libraries read as they are imported."""
    return {name: value for name, value in environment().items() if not name.startswith("TRIMTAB_")}


def run_goes_on() -> bool:
    """Whether the run that started this process is still there; True where no run did."""
    pid = os.environ.get(RUN_PID)
    return not pid or Path(f"/proc/{pid}").exists()


def follow_run() -> None:
    """Ends this process soon after the run that started it: an orphan would compete with the run's successor."""

    def watch() -> None:
        while run_goes_on():
            time.sleep(1)
        os._exit(1)

    if os.environ.get(RUN_PID):
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
    return outcome(function, lambda: getattr(imported(module), function)(**arguments))


def imported(module: str) -> ModuleType:
    """Imports a module without looking for garbage meanwhile: among a million objects that stay, there is hardly any,
    and to look takes an eighth of the time."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()


def outcome(name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Returns what a call returns, or how it failed, as `answer_of` does; messages call it `name`.

    The peak memory is that of this process, or of the largest that it started and waited for.
    """
    started, busy = time.monotonic(), _cpu_seconds()
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
    told = {"seconds": time.monotonic() - started, "cpu_seconds": _cpu_seconds() - busy}
    return {"value": value, **told, "peak_memory_bytes": largest * 1024, "peak_gpu_bytes": _peak_gpu_bytes()}


def _cpu_seconds() -> float:
    """The seconds of all cores that this process has used, and those that it started and waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)


def _peak_gpu_bytes() -> int:
    """The most that PyTorch has reserved of the first GPU, where the work has loaded it."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch and torch.cuda.is_initialized() else 0


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it in three ways: torch.OutOfMemoryError, a CPU allocator's RuntimeError, a CUDA one's."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )


def work_on(request: dict[str, Any]) -> None:
    """Does the work of a request of `call`, and writes its answer."""
    answer = answer_of(request["work"], request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _main() -> None:
    die_with(int(sys.argv[1]))
    work_on(json.load(sys.stdin))


if __name__ == "__main__":
    _main()
