"""A process that keeps what the children of a run have imported, and forks the next child from itself.

An import of PyTorch, transformers and ModelOpt takes ten seconds on a slow processor, and a run on one machine has
twenty children that import the same. The run names a socket (`child.FORK_SERVER`); the first child that is wanted
starts this server, which ends with the run or when the socket's file is gone. While that child works, the server
imports what the run says that later ones will want (`child.IMPORTS_AHEAD`). Python's own fork server
(`multiprocessing.forkserver`) serves only the process that started it, and here each stage is another one.

A fork cannot use a GPU whose driver its parent has started. PyTorch counts GPUs without it where it is asked to, but
ModelOpt starts it while it is imported. So where GPUs are, the server imports what the run says and nothing else; and
if that starts the driver all the same, the server says no from then on, and children are new processes.

Run as: python -m trimtab.base.fork_server SOCKET
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from trimtab.base import child, environment


def serve(path: Path) -> dict[str, Any] | None:
    """Answers requests at a socket. Returns None when it is time to end, and in each forked child its request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the run and the children; they close the connection
    listener = socket.socket(socket.AF_UNIX)
    unready = path.with_name(f"{path.name}.{os.getpid()}")  # who finds the socket's file finds it listening
    listener.bind(str(unready))
    listener.listen()
    try:
        os.link(unready, path)
    except FileExistsError:  # another one was started at the same time
        return None
    finally:
        unready.unlink()
    own = child.environment_of_imports()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    ahead = [name for name in os.environ.get(child.IMPORTS_AHEAD, "").split(",") if name]
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while len(waiting.get_map()) > 1 or (path.exists() and child.run_goes_on()):
            for key, _ in waiting.select(timeout=1):
                if key.fileobj is not listener:
                    _end(waiting, *key.data)
                    continue
                connection, _ = listener.accept()
                try:
                    request, streams = _read(connection)
                except (OSError, ValueError):  # the client is gone
                    connection.close()
                    continue
                same = request["environment_of_imports"] == own
                if same and not environment.has_gpu():
                    _import(request["work"].partition(":")[0])
                if not same or environment.has_started_gpus():
                    connection.sendall(child.DECLINED)
                    connection.close()
                    _close(streams)
                    continue
                pid = os.fork()
                if not pid:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    child.die_with(os.getppid())
                    listener.close()
                    connection.close()
                    for stream, kept in enumerate(streams, start=1):
                        os.dup2(kept, stream)
                    return request
                _close(streams)
                process = os.pidfd_open(pid)
                for watched in (process, connection):  # the child's end, or the client's
                    waiting.register(watched, selectors.EVENT_READ, (pid, process, connection))
                while ahead and not waiting.select(timeout=0):
                    _import(ahead.pop(0))
    return None


def _read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns a request, one line of JSON, and the two descriptors that stand for standard output and error."""
    size = 2 * array.array("i").itemsize
    first, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(size))
    streams = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data[: len(data) // streams.itemsize * streams.itemsize])
    with connection.makefile("rb") as file:
        return json.loads(first + file.readline()), list(streams)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _import(module: str) -> None:
    """Imports a module for this child and those to come."""
    with contextlib.suppress(BaseException):  # the child meets it again, and says so where people look
        child.imported(module)


def _end(waiting: selectors.BaseSelector, pid: int, process: int, connection: socket.socket) -> None:
    """Tells a client how its child ended; a child whose client is gone is killed first."""
    if connection.fileno() < 0:  # the other of its two events came with this one
        return
    with contextlib.suppress(ProcessLookupError):
        if not os.waitid(os.P_PIDFD, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    for watched in (process, connection):
        waiting.unregister(watched)
    os.close(process)
    connection.close()


def _main() -> None:
    path = Path(sys.argv[1])
    request = serve(path)
    if request is not None:
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        child.work_on(request)


if __name__ == "__main__":
    _main()
