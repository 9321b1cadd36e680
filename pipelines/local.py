"""Runs the pipeline on this machine through kfp.local, with progress for people."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from kfp import local
from rich.console import Console

from trimtab.base import child, errors, progress
from trimtab.base.errors import Failure, InputError, StageError, TrimtabError
from trimtab.loop.state import State
from trimtab.pipelines import tasks
from trimtab.pipelines.optimize import optimize_pipeline
from trimtab.recipe import Prices
from trimtab.stages.profile import Profile

#: Imports PyTorch and transformers, and starts no GPU's driver. With few cores it would take from the first child.
_IMPORTS_AHEAD = "trimtab.components.calibration.work"
_FEW_CORES = 4
#: A counted event is printed at most once in this many seconds.
QUIET_SECONDS = 15


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last state (None when a stage failed before the summary), the page, the release."""

    state: State | None
    page: Path | None
    release: str | None
    error: TrimtabError | None
    log: Path


def run(
    arguments: dict[str, Any],
    folder: Path,
    console: Console,
    runner: Any = None,
    events: TextIO | None = None,
    prices: Prices | None = None,
) -> Outcome:
    """Runs `optimize` and returns how it ended; an error of a stage is part of the outcome.

    Args:
        arguments: the pipeline's parameters by name.
        folder: where KFP's artifacts, the log and the events of this run go, a folder for each run.
        console: where progress is printed.
        runner: a kfp.local runner; the default runs each task as a process of this Python.
        events: where every event is written too, as a line of JSON; not the standard output, which goes to the log.
        prices: what an hour costs here, for the ledger.

    Raises:
        InputError: a parameter or path that kfp.local would silently change.
    """
    for name, value in {**arguments, "folder": folder}.items():
        if "python3" in str(value):
            raise InputError(
                f"{name}: '{value}' contains 'python3', which kfp.local replaces; use another path"
            )
    root = _new_folder(folder)
    log, told = root / "run.log", root / "events.jsonl"
    os.environ[progress.ENVIRONMENT] = str(told)
    os.environ[child.RUN_PID] = str(os.getpid())
    error: TrimtabError | None = None
    pipeline = optimize_pipeline(unrolled=arguments["max_attempts"], profile=Profile(prices=prices))
    with (
        _followed(told, console, events),
        _output_into(log),
        tasks.forked(),
        _fork_server(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # KFP warns of image names and of resources that only a cluster has
        local.init(
            runner=runner or local.SubprocessRunner(use_venv=False),
            pipeline_root=str(root),
            raise_on_error=True,
        )
        try:
            pipeline(**arguments)
        except Exception:  # kfp.local's own RuntimeError, and whatever a container engine raises
            traceback.print_exc()
            error = _error_in(log)
    release = _release(root)
    if error is None and release is None:  # a container engine can lose an exit code: a failure that looks like none
        error = _error_in(log)
    return Outcome(*_summary(root), release if error is None else None, error, log)


@contextlib.contextmanager
def _fork_server() -> Iterator[None]:
    """Names a place where the stages' children share their imports; what serves there ends when it is gone."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        os.environ[child.FORK_SERVER] = str(Path(folder) / "socket")
        os.environ[child.IMPORTS_AHEAD] = _IMPORTS_AHEAD if (os.cpu_count() or 1) > _FEW_CORES else ""
        try:
            yield
        finally:
            del os.environ[child.FORK_SERVER], os.environ[child.IMPORTS_AHEAD]


def _new_folder(folder: Path) -> Path:
    """Makes the folder of a run, named by the second: `-2` and so on where others began in the same one."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        root = folder / (now if number == 1 else f"{now}-{number}")
        with contextlib.suppress(FileExistsError):
            root.mkdir(parents=True)
            return root
    raise AssertionError("there is always a free name")


def _summary(root: Path) -> tuple[State | None, Path | None]:
    outcome = next(root.glob("*/summarize*/outcome"), None)
    page = next(root.glob("*/summarize*/report"), None)
    if outcome is None or page is None:
        return None, None
    shown = page.with_suffix(".html")  # a browser goes by the name
    shown.write_bytes(page.read_bytes())
    return State.parse(outcome.read_text(encoding="utf-8")), shown


def _release(root: Path) -> str | None:
    """Returns what the gate of this run released."""
    output = next(root.glob("*/gate/executor_output.json"), None)
    return json.loads(output.read_text(encoding="utf-8"))["parameterValues"]["Output"] if output else None


def _error_in(log: Path) -> TrimtabError:
    """Returns the last of trimtab's own errors in the log: the stage that failed said what to do.

    Those that end a traceback count, at the beginning of a line, before others that were only told of. A Failure that
    no stage turned into a verdict is one of the stage.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    told = re.findall(rf"^(.*){re.escape(errors.__name__)}\.(\w+): (.*)$", text, re.MULTILINE)
    found = [(name, message) for before, name, message in told if not before] or [line[1:] for line in told]
    for name, message in reversed(found):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, TrimtabError):
            return (StageError if issubclass(kind, Failure) else kind)(message.strip())
    return StageError(f"a stage failed; its output is in {log}")


@contextlib.contextmanager
def _output_into(log: Path) -> Iterator[None]:
    """Sends everything that KFP and the stages print to the log: Python's streams, and the file descriptors that
    child processes inherit."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("a", buffering=1, encoding="utf-8") as file:  # line by line: the log is read before it is closed
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def _followed(told: Path, console: Console, events: TextIO | None = None) -> Iterator[None]:
    """Prints the events of all processes while the body runs, where the console prints before it."""
    stop = threading.Event()
    told.touch()
    with _fixed(console):
        thread = threading.Thread(target=_follow, args=(told, console, stop, events), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def _fixed(console: Console) -> Iterator[None]:
    """Keeps a console on its stream while `_output_into` sends that stream's descriptor elsewhere."""
    before = console.file
    try:
        own = os.dup(before.fileno())
    except (OSError, ValueError):  # not a file of the system
        console.file = before
        yield
        return
    with os.fdopen(own, "w", encoding="utf-8") as file:
        console.file = file
        try:
            yield
        finally:
            console.file = before


def _follow(told: Path, console: Console, stop: threading.Event, events: TextIO | None = None) -> None:
    started, shown, pace = time.time(), 0.0, progress.Pace()
    with told.open(encoding="utf-8") as file:
        while True:
            ending = stop.is_set()
            for line in file:
                event = json.loads(line)
                event["remaining"] = pace.remaining(event)
                if events:
                    print(json.dumps({"event": "progress", **event}, ensure_ascii=False), file=events)
                counting = 0 < event["done"] < event["total"] or (event["total"] and not event["done"])
                if counting and event["time"] - shown < QUIET_SECONDS:
                    continue
                shown = event["time"]
                minutes, seconds = divmod(int(event["time"] - started), 60)
                console.print(f"[dim]{minutes:02d}:{seconds:02d}[/dim]  {_line(event)}", highlight=False)
            if ending:
                return
            time.sleep(0.3)


def _line(event: dict[str, Any]) -> str:
    text = progress.describe(event).replace("[", r"\[")
    return f"[bold]{text}[/bold]" if event["stage"].startswith(("attempt", "release")) else text
