"""What a run has told so far: its verdicts and its rollout, where someone outside the cluster can read them.

Kubeflow Pipelines' API knows the state of each task and not what a task returned or prints, so the run puts both into
the store's index under keys of the run, and `trimtab watch` reads them there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trimtab import progress
from trimtab.errors import TrimtabError
from trimtab.schema import digest
from trimtab.state import Brief, State
from trimtab.store import Store, open_store

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def tell(state: State, run: str) -> None:
    """Writes the verdicts of a run down; the last writer wins. A run on this machine tells its terminal instead: its
    id is a number of kfp.local's, where a server's is a UUID.

    Trouble of the store is reported and does not fail the task: the run itself goes on without a watcher.
    """
    briefs = [state.baseline, *state.history] if state.baseline else []
    _put(lambda: open_store(state.store), run, "attempts", [_line(brief) for brief in briefs])


def tell_rollout(store: Store, run: str, lines: list[str]) -> None:
    """Writes down what has happened so far in the rollout of a run's release, as `tell` does."""
    _put(lambda: store, run, "rollout", lines)


def told(store: Store, run: str) -> list[dict[str, Any]]:
    """Returns the verdicts of a run so far, baseline first: [{"recipe", "outcome", "reason"}, …]."""
    return _get(store, run, "attempts")


def told_rollout(store: Store, run: str) -> list[str]:
    """Returns what has happened so far in the rollout of a run's release."""
    return _get(store, run, "rollout")


def _put(store: Callable[[], Store], run: str, what: str, value: list[Any]) -> None:
    if not UUID.fullmatch(run):
        return
    try:
        store().record(_key(run, what), {what: value})
    except TrimtabError as error:
        progress.report("watch", f"those who watch do not see it: {error}")


def _get(store: Store, run: str, what: str) -> list[Any]:
    record = store.lookup(_key(run, what))
    return record[what] if record else []


def _key(run: str, what: str) -> str:
    return digest(["bulletin", run, what])


def _line(brief: Brief) -> dict[str, Any]:
    return {"recipe": brief.recipe.title, "outcome": brief.verdict.outcome, "reason": brief.verdict.reason}
