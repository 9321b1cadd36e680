"""Reads the evidence again, judges anew, signs what it found, and writes the release."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from trimtab import stages
from trimtab.base import child, progress, signing
from trimtab.base.errors import NotReleased, NotVerified
from trimtab.loop import evidence
from trimtab.loop.documents import load
from trimtab.release import judgement, papers, statement
from trimtab.store import Store, Tree, open_store


def run(state_uri: str, artifact: Any) -> str:
    """Releases the accepted attempt and returns the release's URI; the same artifact is released once.

    Args:
        state_uri: the document of the last attempt.
        artifact: KFP Model artifact.

    The key is TRIMTAB_SIGNING_KEY of the gate's own environment; no other stage needs it.

    Raises:
        NotReleased: no attempt was accepted, or the stored evidence does not support it, or the release must be
            signed and there is no key; says why.
        InputError: the key cannot be used.
    """
    child.follow_run()
    state = load(state_uri)
    accepted = state.history[-1] if state.history else None
    if accepted is None or accepted.verdict.outcome != "accepted":
        last = accepted or state.baseline
        raise NotReleased(f"nothing is released: {last.verdict.reason if last else 'nothing was measured'}")
    signer = signing.signer()
    if signing.is_required() and not signer:
        remedy = f"set {signing.KEY} for the gate, or {signing.REQUIRED}=0"
        raise NotReleased(f"nothing is released: releases must be signed and the gate has no key: {remedy}")
    store = open_store(state.store)
    refusal = judgement.refusal(store, state, accepted)
    if refusal:
        raise NotReleased(f"nothing is released: {refusal}")
    document = evidence.read(store, accepted.evaluation)

    def record(version: str) -> dict[str, Any]:
        paper = papers.write(store, state.name, version, document, signer)
        verdict = accepted.verdict.to_dict()
        said = statement.make(state.name, version, document, accepted.evaluation, accepted.engine, verdict, paper)
        return statement.release_record(signing.seal(statement.payload(said), signer))

    same = {
        "artifact": document["export"],
        "engine": accepted.engine.model_dump() if accepted.engine else None,
        "evidence": accepted.evaluation.model_dump(),
        "signed_by": signer.public_key.keyid if signer else signing.UNSIGNED,
    }
    uri = _released_before(store, state.name, same) or store.release(state.name, record)
    stages.describe_tree(artifact, Tree.model_validate(document["export"]))
    origin = {"base_model_uri": state.model.uri, "base_model_digest": state.model.digest}
    artifact.metadata.update({"release": uri, **origin, **stages.model_facts(accepted.recipe, is_quantized=True)})
    progress.report("release", uri if signer else f"{uri} (unsigned)")
    return uri


def _released_before(store: Store, name: str, same: dict[str, Any]) -> str | None:
    """The newest release's URI when it is this very artifact with this very evidence, signed alike and still valid."""
    newest = store.newest(name)
    before = store.read_release(newest) if newest else {}
    if any(before.get(field) != value for field, value in same.items()):
        return None
    try:
        said = statement.read(signing.unseal(before["attestation"])).predicate
        statement.check_time(said, datetime.now(UTC))
    except NotVerified:
        return None
    return newest
