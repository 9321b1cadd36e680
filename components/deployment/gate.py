"""Reads the evidence again, judges anew, and writes the release."""

from __future__ import annotations

from typing import Any

from trimtab import child, evidence, progress, stages
from trimtab.errors import NotReleased
from trimtab.state import State
from trimtab.store import Tree, open_store


def run(state_json: str, artifact: Any) -> str:
    """Releases the accepted attempt and returns the release's URI; the same artifact is released once.

    Raises:
        NotReleased: no attempt was accepted, or the stored evidence does not support it; says why.
    """
    child.follow_run()
    state = State.parse(state_json)
    accepted = state.history[-1] if state.history else None
    if accepted is None or accepted.verdict.outcome != "accepted":
        last = accepted or state.baseline
        raise NotReleased(f"nothing is released: {last.verdict.reason if last else 'nothing was measured'}")
    store = open_store(state.store)
    refusal = evidence.check(store, state, accepted)
    if refusal:
        raise NotReleased(f"nothing is released: {refusal}")
    document = evidence.read(store, accepted.evaluation)
    record = {
        "model": document["model"],
        "artifact": document["export"],
        "engine": accepted.engine.model_dump() if accepted.engine else None,
        "evidence": accepted.evaluation.model_dump(),
        "recipe": document["recipe"],
        "goal": state.goal,
        "target": state.target,
        "verdict": accepted.verdict.to_dict(),
    }
    uri = _released_before(store.releases(state.name), record) or store.release(state.name, record)
    stages.describe_tree(artifact, Tree.model_validate(document["export"]))
    artifact.metadata["release"] = uri
    progress.report("release", uri)
    return uri


def _released_before(releases: list[dict[str, Any]], record: dict[str, Any]) -> str | None:
    """The newest release's URI when it is this very artifact with this very evidence."""
    newest = releases[-1] if releases else None
    if newest and all(newest["record"].get(key) == record[key] for key in ("artifact", "evidence")):
        return newest["uri"]
    return None
