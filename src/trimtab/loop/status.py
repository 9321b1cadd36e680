"""The status of a run: its verdicts and its rollout so far, where someone outside the cluster can read them.

Kubeflow Pipelines' API knows the state of each task and not what a task returned or prints, so the run writes both into
the store, under `status/<run>/`, and `trimtab watch` reads them there. They name no tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import TrimtabError
from trimtab.loop.state import Brief, State
from trimtab.store import Store, open_store

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def write_attempts(state: State, run: str) -> None:
    """Writes the verdicts of a run down; the last writer wins. A run on this machine tells its terminal instead: its
    id is a number of kfp.local's, where a server's is a UUID.

    Trouble of the store is reported and does not fail the task: the run itself goes on without a watcher.
    """
    _write(lambda: open_store(state.store), run, "attempts", [_line(brief) for brief in state.finished])


def write_rollout(store: Store, run: str, lines: list[str]) -> None:
    """Writes down what has happened so far in the rollout of a run's release, as `write_attempts` does."""
    _write(lambda: store, run, "rollout", lines)


def attempts(store: Store, run: str) -> list[dict[str, Any]]:
    """Returns the verdicts of a run so far, baseline first: [{"recipe", "outcome", "reason"}, …]."""
    return store.status(run, "attempts") or []


def rollout(store: Store, run: str) -> list[str]:
    """Returns what has happened so far in the rollout of a run's release."""
    return store.status(run, "rollout") or []


def _write(store: Callable[[], Store], run: str, what: str, value: list[Any]) -> None:
    if not UUID.fullmatch(run):
        return
    try:
        store().write_status(run, what, value)
    except TrimtabError as error:
        progress.report("watch", f"those who watch do not see it: {error}")


def _line(brief: Brief) -> dict[str, Any]:
    return {"recipe": brief.recipe.title, "outcome": brief.verdict.outcome, "reason": brief.verdict.reason}
