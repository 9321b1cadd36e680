"""Follows a run on a server: tasks as they begin and end, verdicts and rollout as they come, and the exit code.

The server names a task by its key in the compiled pipeline, without the box that it stands in. Attempts follow one
another, so a stage belongs to the attempt that began last before it. A pod that was killed says nothing of it: to the
server's own records its task runs on for ever. Here it is told by what Argo did: by a further pod of the same task, or,
when the run is over, by a task that is not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from trimtab.base.errors import InputError, NotReleased, StageError, StoreError, TrimtabError
from trimtab.loop import status
from trimtab.pipelines.cluster.connection import TIMEOUT, Connection
from trimtab.pipelines.package import REVIEW, ROLLED_BACK, ROLLOUT
from trimtab.store import Store, open_store

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
SHOWN = {"RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "CANCELED": "canceled"}
#: What the boxes are called that the stages stand in.
BOX = re.compile(r"baseline|attempt \d+")
#: What Argo calls the pods of a task: the first of them is number 0.
POD_BEGUN_ANEW = re.compile(r"executor\((\d+)\)")
#: Seconds between two looks.
INTERVAL = 10.0


def watch(connection: Connection, run_id: str, interval: float = INTERVAL) -> str:
    """Prints what happens until the run ends, and returns what it did, in a few words for people.

    Raises:
        InputError: there is no such run, or it may not be seen.
        NotReleased: the run is complete, and no recipe passed, or its release was rolled back.
        StageError: a stage of it failed, it was canceled, or the server stays unreachable.
    """
    seen: dict[str, str] = {}
    told, lost = _Told(run_id, connection.console), _Lost(connection.console)
    while True:
        get = connection.client.runs.run_service_get_run
        run = connection.read(f"read run '{run_id}'", get, run_id=run_id, _request_timeout=TIMEOUT)
        tasks = list(_tasks(run))
        lost.show(run, tasks)
        ends = {(name, state) for _, name, state in tasks}
        for key, name, state in tasks:
            if state in SHOWN and seen.get(key) != state:
                seen[key] = state
                style = "red" if state == "FAILED" else "default" if state == "RUNNING" else "dim"
                connection.console.print(f"{name}: {SHOWN[state]}", style=style, highlight=False, markup=False)
        told.show(run)
        if run.state in FINISHED:
            if error := _error(run, tasks, told):
                raise error
            kept = any(name == REVIEW for _, name, _ in tasks) and ("deploy gate", "SUCCEEDED") not in ends
            return "nothing has changed, so the run kept the last release" if kept else "the run released its model"
        time.sleep(interval)


class _Lost:
    """Prints each pod that was killed and begun anew, once."""

    def __init__(self, console: Console):
        self._console = console
        self._seen: set[str] = set()

    def show(self, run: Any, tasks: list[tuple[str, str, str]]) -> None:
        working = next((name for _, name, state in reversed(tasks) if state == "RUNNING"), "a task")
        for task in _details(run):
            again = POD_BEGUN_ANEW.fullmatch(task.display_name or "")
            if again and int(again[1]) and task.task_id not in self._seen:
                self._seen.add(task.task_id)
                line = f"{working}: its pod was killed; begun again, try {int(again[1]) + 1}"
                self._console.print(line, style="red", highlight=False, markup=False)


class _Told:
    """Prints each verdict and each line of the rollout once, as far as the run's store can be read from here."""

    def __init__(self, run_id: str, console: Console):
        self.attempts: list[dict[str, Any]] = []
        self.rollout: list[str] = []
        self._run_id, self._console = run_id, console
        self._store: Store | None = None
        self._blind = False

    def show(self, run: Any) -> None:
        if self._blind:
            return
        try:
            if self._store is None:
                self._store = open_store(str((run.runtime_config.parameters or {})["store"]))
            attempts = status.attempts(self._store, self._run_id)
            rollout = status.rollout(self._store, self._run_id)
        except StoreError:
            return  # away for a moment; the next look may see it
        except (TrimtabError, AttributeError, KeyError) as error:
            self._blind = True
            self._console.print(f"verdicts are not shown, the run's page has them: {error}", style="dim", markup=False)
            return
        for number, attempt in list(enumerate(attempts))[len(self.attempts) :]:
            name = f"attempt {number}" if number else "baseline"
            line = f"{name}, {attempt['recipe']}: {attempt['outcome']}; {attempt['reason']}"
            self._console.print(line, style="bold", markup=False, highlight=False)
        for line in rollout[len(self.rollout) :]:
            # A command is copied from here, so it stays one line.
            self._console.print(f"{ROLLOUT}: {line}", style="bold", markup=False, highlight=False, soft_wrap=True)
        self.attempts, self.rollout = attempts, rollout


def _tasks(run: Any) -> Iterator[tuple[str, str, str]]:
    """Yields (id, name for people, state) of the tasks that people know, in the order in which they began."""
    names, stages = _names(run.pipeline_spec or {})
    attempt = ""
    for task in _details(run):
        if task.display_name in names:
            name = names[task.display_name]
            attempt = name if BOX.fullmatch(name) else attempt
            yield task.task_id, name, task.state or ""
        elif task.display_name in stages and attempt:
            yield task.task_id, f"{attempt}, {stages[task.display_name]}", task.state or ""


def _details(run: Any) -> list[Any]:
    """What the server tells of tasks, pods and drivers, in the order in which they began."""
    details = (run.run_details.task_details if run.run_details else None) or []
    return sorted(details, key=lambda task: (task.create_time is None, str(task.create_time)))


def _names(spec: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The keys of the tasks → their display names: outside the attempts, and inside any attempt."""
    spec = spec.get("pipeline_spec", spec)
    outside: dict[str, str] = {}
    inside: dict[str, str] = {}
    parts = {"root": spec.get("root", {}), **spec.get("components", {})}
    for component, part in parts.items():
        for key, task in part.get("dag", {}).get("tasks", {}).items():
            if key.startswith("condition"):
                continue  # a branch: what is in it has names of its own
            names = inside if component.startswith("comp-attempt") else outside
            names[key] = task["taskInfo"]["name"]
    return outside, inside


def _error(run: Any, tasks: list[tuple[str, str, str]], said: _Told) -> TrimtabError | None:
    if run.state == "SUCCEEDED":
        return None
    if run.state == "CANCELED":
        return StageError("the run was canceled; submit it again: stages that were complete are not run again")
    attempts, failed = said.attempts, [name for _, name, state in tasks if state == "FAILED"]
    if ROLLED_BACK in failed:
        last = said.rollout[-1] if said.rollout else "the rollout's page says why"
        return NotReleased(f"the run released its model, which does not serve: {last}")
    told = f": {attempts[-1]['reason']}" if attempts else ""
    if any(name == "deploy gate" for name in failed) and not (attempts and attempts[-1]["outcome"] == "accepted"):
        return NotReleased(f"no recipe passed{told or '; the summary of the run says why'}")
    killed = [name for _, name, state in tasks if state == "RUNNING" and not BOX.fullmatch(name)]
    if killed and not failed:
        return StageError(
            f"{killed[-1]} was killed: its pod ended without a word (evicted, out of memory, past its "
            f"timeout_hours); submit it again: it goes on from what it had finished"
        )
    where = failed[-1] if failed else "a task"
    message = getattr(run.error, "message", "") or ""
    return StageError(f"{where} failed{f' ({message})' if message else ''}; its log is on the run's page")


def read_run_id(text: str) -> str:
    """Returns the id in what people paste: the id itself, or the address of the run's page."""
    run_id = text.rstrip("/").rpartition("/")[2]
    if not run_id or not all(c.isalnum() or c == "-" for c in run_id):
        raise InputError(f"run: '{text}' is not valid; write the id of a run, or the address of its page")
    return run_id
