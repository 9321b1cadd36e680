"""The deploy gate releases what the stored answers allow once more, signs it, and refuses everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp import local

from trimtab.base import signing
from trimtab.base.errors import InputError, NotReleased, NotVerified, StoreError
from trimtab.components.deployment import gate
from trimtab.components.deployment.component import gate as gate_component
from trimtab.loop import evidence
from trimtab.loop.documents import save
from trimtab.loop.state import State
from trimtab.recipe import Acceptance, Recipe
from trimtab.release.verification import verify
from trimtab.store import Tree

from .filed import Script, asked, first_attempt, items_of, windows_of

pytestmark = pytest.mark.slow


@pytest.fixture
def accepted(script: Script) -> State:
    state = first_attempt(script)
    assert state.history[-1].verdict.outcome == "accepted"
    return state


def release(state: State, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return gate.run(save(state), SimpleNamespace(path=str(folder / "released"), metadata={}))


def rewritten(script: Script, state: State, change: Callable[[dict[str, Any]], None]) -> State:
    """The state with evidence in which something was changed."""
    document = evidence.read(script.store, state.history[-1].evaluation)
    change(document)
    folder = script.folder / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "evidence.json").write_text(json.dumps(document))
    return with_last(state, evaluation=script.store.put(folder, kind="evidence"))


def with_last(state: State, **fields: Any) -> State:
    last = state.history[-1].model_copy(update=fields)
    return state.model_copy(update={"history": (*state.history[:-1], last)})


def other_scores(script: Script, state: State) -> State:
    """The evidence names the answers of a model that lost a third of its ability, under the key of the asked ones."""
    _, items, windows = next(asked())
    document = evidence.read(script.store, state.history[-1].evaluation)
    look = Tree.model_validate(document["measured"]["look-1"])
    about = script.store.manifest(look).metadata
    worse = script.record(about["key"], "evaluation", {
        "items.jsonl": "".join(json.dumps(item) + "\n" for item in items_of(items, 0.3)),
        "windows.json": json.dumps(windows_of(windows, 1.02)),
    }, {}, about["environment"])  # fmt: skip
    return rewritten(script, state, lambda document: document["measured"].update({"look-1": worse.model_dump()}))


def the_candidate_as_its_own_baseline(script: Script, state: State) -> State:
    def change(document: dict[str, Any]) -> None:
        measured = document["measured"]
        measured |= {name: measured[name.removeprefix("baseline-")] for name in measured if "look" in name}

    return rewritten(script, state, change)


def without_its_confirmation(script: Script, state: State) -> State:
    return rewritten(script, state, lambda document: document["measured"].pop("look-4"))


def another_model(script: Script, state: State) -> State:
    return state.model_copy(update={"model": state.model.model_copy(update={"digest": "f" * 64})})


def another_recipe(script: Script, state: State) -> State:
    return with_last(state, recipe=Recipe.parse("quantize: {format: int8_wo}"))


def easier_limits(script: Script, state: State) -> State:
    recipe = state.history[-1].recipe
    return with_last(state, recipe=recipe.model_copy(update={"accept": Acceptance(min_recovery=0.5)}))


def filed_as_rejected(script: Script, state: State) -> State:
    return rewritten(script, state, lambda document: document["verdict"].update({"outcome": "rejected"}))


def no_evidence(script: Script, state: State) -> State:
    return with_last(state, evaluation=None)


def not_accepted(script: Script, state: State) -> State:
    verdict = state.history[-1].verdict
    return with_last(state, verdict=verdict.model_copy(update={"outcome": "rejected", "reason": "it fell short"}))


def nothing_tried(script: Script, state: State) -> State:
    return state.model_copy(update={"history": ()})


REFUSALS = [
    (other_scores, "judged anew, the stored answers say: rejected"),
    (the_candidate_as_its_own_baseline, "'baseline-look-1' is not what the plan asks for"),
    (without_its_confirmation, "the evidence lacks its confirmation"),
    (another_model, "the evidence is of model"),
    (another_recipe, "the evidence is of another recipe"),
    (easier_limits, "the evidence is of another recipe"),
    (filed_as_rejected, "the evidence says: rejected"),
    (no_evidence, "there is no evidence for the accepted attempt"),
    (not_accepted, "nothing is released: it fell short"),
    (nothing_tried, "nothing is released: the model unchanged"),
]


@pytest.mark.parametrize(("tamper", "reason"), REFUSALS, ids=[tamper.__name__ for tamper, _ in REFUSALS])
def test_gate_refuses(tamper, reason, script, accepted, tmp_path):
    with pytest.raises(NotReleased, match=reason):
        release(tamper(script, accepted), tmp_path / "gate")
    assert script.store.releases("tiny") == []


@pytest.mark.parametrize("what", ["evidence", "export"])
def test_gate_refuses_what_is_gone(what, script, accepted, tmp_path, monkeypatch):
    last = accepted.history[-1]
    tree = last.evaluation if what == "evidence" else Tree.model_validate(
        evidence.read(script.store, last.evaluation)["export"]
    )  # fmt: skip
    (tmp_path / "store" / "trees" / f"{tree.digest}.json").unlink()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "another-node"))
    with pytest.raises(StoreError, match="there is no tree"):
        release(accepted, tmp_path / "gate")


def test_gate_refuses_changed_bytes(script, accepted, tmp_path, monkeypatch):
    """Someone edits the answers in the store; a node that has no copy yet sees that the checksum is wrong."""
    document = evidence.read(script.store, accepted.history[-1].evaluation)
    manifest = script.store.manifest(Tree.model_validate(document["measured"]["look-1"]))
    checksum = manifest.files["items.jsonl"].sha256
    blob = tmp_path / "store" / "blobs" / checksum[:2] / checksum
    changed = blob.read_bytes().replace(b'"score": 0.0', b'"score": 1.0')
    blob.chmod(0o644)
    blob.unlink()
    blob.write_bytes(changed)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "another-node"))
    with pytest.raises(StoreError, match="items.jsonl.*corrupted"):
        release(accepted, tmp_path / "gate")


def test_gate_releases_once(script, accepted, tmp_path):
    first = release(accepted, tmp_path / "gate")
    assert release(accepted, tmp_path / "gate") == first == f"{script.store.uri}/releases/tiny/000001"
    record = script.store.read_release(first)
    assert record["evidence"] == accepted.history[-1].evaluation.model_dump()
    assert record["verdict"]["outcome"] == "accepted"


def test_gate_signs(script, accepted, tmp_path, monkeypatch):
    """With a key the release is signed, once; without one it says that it is not; another key signs it anew."""
    monkeypatch.delenv(signing.KEY, raising=False)
    unsigned = release(accepted, tmp_path / "gate")
    assert script.store.read_release(unsigned)["signed_by"] == "unsigned"
    for number, name in enumerate(("first", "second"), start=2):
        public, identity = signing.generate(tmp_path / name)
        monkeypatch.setenv(signing.KEY, str(tmp_path / name))
        signed = release(accepted, tmp_path / "gate")
        assert signed == release(accepted, tmp_path / "gate") == f"{script.store.uri}/releases/tiny/{number:06d}"
        assert script.store.read_release(signed)["signed_by"] == identity
        key = signing.public_key(public)
        assert verify(script.store, signed, [key]).predicate.artifact == accepted.trees["export"]
        with pytest.raises(NotVerified, match="it is unsigned"):
            verify(script.store, unsigned, [key])


def test_gate_signs_anew_what_has_expired(script, accepted, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_SIGNATURE_DAYS", "0.000000001")
    first = release(accepted, tmp_path / "gate")
    assert release(accepted, tmp_path / "gate") != first


def test_gate_that_must_sign(script, accepted, tmp_path, monkeypatch):
    monkeypatch.setenv(signing.REQUIRED, "1")
    monkeypatch.delenv(signing.KEY, raising=False)
    with pytest.raises(NotReleased, match="must be signed and the gate has no key: set TRIMTAB_SIGNING_KEY"):
        release(accepted, tmp_path / "gate")
    monkeypatch.setenv(signing.KEY, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="TRIMTAB_SIGNING_KEY: the file cannot be read"):
        release(accepted, tmp_path / "gate")
    assert script.store.releases("tiny") == []


def test_gate_fails_its_task(script, accepted, tmp_path, capfd):
    """What the function refuses fails the pipeline's task, and so the run."""
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    with pytest.raises(RuntimeError, match="gate"):
        gate_component(state=save(other_scores(script, accepted)))
    assert "trimtab.base.errors.NotReleased: nothing is released: judged anew" in capfd.readouterr().out
    assert script.store.releases("tiny") == []
