"""Tasks of a run on this machine, forked from a process that has imported what they share.

kfp.local starts a Python for each, which takes most of a second to import what the one before it had: nearly all the
time of a run that finds its results in the store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from kfp.dsl import executor_main
from kfp.local import subprocess_task_handler

from trimtab import stages  # noqa: F401, every task imports it
from trimtab.base import child
from trimtab.base.errors import Failure, StageError

#: How the command of a component without packages of its own begins; then come its source and its arguments.
_COMMAND = ["sh", "-ec"]


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Has kfp's SubprocessRunner fork the tasks that only need this Python, while the body runs.

    What they print goes where this process's descriptors of standard output and error lead.
    """
    started = subprocess_task_handler.run_local_subprocess
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:

        def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
            own = full_command[:2] == _COMMAND and "ephemeral_component.py" in full_command[2] and not env_vars
            code = _run(full_command[3], full_command[4:], Path(folder)) if own else None
            return started(full_command, env_vars) if code is None else code

        child.serve_forks(str(Path(folder) / "socket"))
        subprocess_task_handler.run_local_subprocess = run
        try:
            yield
        finally:
            subprocess_task_handler.run_local_subprocess = started


def _run(source: str, arguments: list[str], folder: Path) -> int | None:
    """Runs a component's source in a fork and returns its exit code; None where nothing serves."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "ephemeral_component.py"
        path.write_text(source, encoding="utf-8")
        told = {"path": str(path), "arguments": arguments}
        request = {"work": f"{__name__}:_execute", "arguments": told, "answer": os.devnull}
        try:
            return child.forked(request, str(folder / "socket"))
        except (Failure, StageError):  # it was killed
            traceback.print_exc()
            return 1


def _execute(path: str, arguments: list[str]) -> None:
    """What the command of a component does, in a process of its own."""
    os.environ["_KFP_RUNTIME"] = "true"
    sys.argv = ["executor_main", "--component_module_path", path, *arguments]
    try:
        executor_main.executor_main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
