"""What a run has told so far: its verdicts, where someone outside the cluster can read them.

Kubeflow Pipelines' API knows the state of each task and not what a task returned, so the run puts the verdicts into
the store's index under a key of the run, and `trimtab watch` reads them there.
"""

from __future__ import annotations

import re
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
    if not UUID.fullmatch(run):
        return
    briefs = [state.baseline, *state.history] if state.baseline else []
    try:
        open_store(state.store).record(_key(run), {"attempts": [_line(brief) for brief in briefs]})
    except TrimtabError as error:
        progress.report("watch", f"those who watch see no verdict: {error}")


def told(store: Store, run: str) -> list[dict[str, Any]]:
    """Returns the verdicts of a run so far, baseline first: [{"recipe", "outcome", "reason"}, …]."""
    record = store.lookup(_key(run))
    return record["attempts"] if record else []


def _key(run: str) -> str:
    return digest(["bulletin", run])


def _line(brief: Brief) -> dict[str, Any]:
    return {"recipe": brief.recipe.title, "outcome": brief.verdict.outcome, "reason": brief.verdict.reason}
