"""A stage whose pod is killed goes on on another node from what it had finished, and waits for what passes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trimtab import stages
from trimtab.base import child, transient
from trimtab.base.errors import StageError, Transient, Unreachable
from trimtab.stages import TENSORS, checkpoints
from trimtab.stages.registry import work_stage
from trimtab.store import Store, open_store

STAGE = work_stage("quantize", "a.b:quantize", "export", TENSORS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes this process one of a pod on a node of that name: nodes share the store alone."""
    monkeypatch.setenv(transient.POD, "10.0.0.1")
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.02)
    monkeypatch.setattr(transient, "PAUSES", (0.0, 0.0))

    def on(node: str) -> None:
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / node))

    on("node-1")
    return on


def work(monkeypatch: pytest.MonkeyPatch, does: Any) -> None:
    """Replaces the child process by a function of its scratch and its output."""

    def call(work: str, *, output: str, scratch: str, parameters: dict[str, Any], **inputs: Any) -> child.Done:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        does(Path(scratch), Path(output))
        return child.Done({}, 1.0, 1)

    monkeypatch.setattr(child, "call", call)


def kept(store: Store) -> list[Path]:
    return list(Path(store.uri.removeprefix("file://")).glob("index/*.json"))


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def finish_two_shards_and_die(store: Store):
    def does(scratch: Path, output: Path) -> None:
        (scratch / "shards").mkdir()
        for number in (1, 2):
            (scratch / "shards" / f"shard-{number}.safetensors").write_text(f"shard {number}")
        (scratch / "shards" / "shard-3.partial").write_text("half")
        (scratch / "training-3.partial").mkdir()  # which several processes write into
        (scratch / "training-3.partial" / "part-1.safetensors").write_text("half")
        until(lambda: kept(store))
        raise StageError("killed")

    return does


def test_another_node_goes_on(store, pod, monkeypatch):
    work(monkeypatch, finish_two_shards_and_die(store))
    with pytest.raises(StageError):
        stages.cached(store, STAGE, {}, {})
    seen = {}

    def does(scratch: Path, output: Path) -> None:
        seen.update({path.name: path.read_text() for path in scratch.rglob("*") if path.is_file()})
        (scratch / "shards" / "shard-1.safetensors").write_text("may be written to")
        (output / "made").write_text("made")

    pod("node-2")
    work(monkeypatch, does)
    stages.cached(store, STAGE, {}, {})
    assert seen == {"shard-1.safetensors": "shard 1", "shard-2.safetensors": "shard 2"}
    (left,) = kept(store)
    assert '"metrics"' in left.read_text(), "the result; what was kept of the work is forgotten"


def test_on_the_same_node_its_own_scratch_counts(store, pod, monkeypatch):
    work(monkeypatch, finish_two_shards_and_die(store))
    with pytest.raises(StageError):
        stages.cached(store, STAGE, {}, {})

    def does(scratch: Path, output: Path) -> None:
        assert (scratch / "shards" / "shard-3.partial").exists()
        (output / "made").write_text("made")

    work(monkeypatch, does)
    stages.cached(store, STAGE, {}, {})


def test_what_is_removed_while_it_is_kept_is_left_out(store, pod, monkeypatch, tmp_path):
    """A stage gives up one file for the next: what is kept is of one moment."""
    scratch = tmp_path / "node-1" / "scratch" / "x"
    scratch.mkdir(parents=True)
    (scratch / "inputs-1").write_text("1")
    link, files = checkpoints.os.link, []

    def replaced(source: Path, target: Path) -> None:
        if not files:
            files.append(source)
            (scratch / "inputs-2").write_text("2")
            source.unlink()
        link(source, target)

    monkeypatch.setattr(checkpoints.os, "link", replaced)
    with checkpoints._snapshot(scratch) as found:
        assert list(found) == ["inputs-2"]


def test_a_long_put_does_not_hold_up_a_result(store, pod, monkeypatch):
    """What nobody will go on from is not sent to its end."""
    began = []
    put = store.put

    def slow(folder: Any, *, kind: str, progress: Any = None, **others: Any) -> Any:
        if kind == checkpoints.KIND:
            began.append(kind)
            until(lambda: _stopped(progress))
            progress(1, 2)
        return put(folder, kind=kind, **others)

    def _stopped(progress: Any) -> bool:
        try:
            progress(1, 2)
        except checkpoints._Ended:
            return True
        return False

    def does(scratch: Path, output: Path) -> None:
        (scratch / "shard").write_text("1")
        until(lambda: began)
        (output / "made").write_text("made")

    monkeypatch.setattr(store, "put", slow)
    work(monkeypatch, does)
    assert not stages.cached(store, STAGE, {}, {}).hit and began


def test_a_machine_of_ones_own_keeps_nothing_and_waits_for_nothing(store, pod, monkeypatch, tmp_path):
    monkeypatch.delenv(transient.POD)
    tries = []

    def does(scratch: Path, output: Path) -> None:
        tries.append(scratch)
        (scratch / "shard").write_text("1")
        time.sleep(0.1)
        raise Transient("the connection broke")

    work(monkeypatch, does)
    with pytest.raises(Transient):
        stages.cached(store, STAGE, {}, {})
    assert len(tries) == 1 and kept(store) == []


def test_what_passes_is_tried_again_from_where_the_work_stands(store, pod, monkeypatch):
    tries = []

    def does(scratch: Path, output: Path) -> None:
        assert list(output.iterdir()) == [], "nothing of an earlier try"
        tries.append(len(list(scratch.iterdir())))
        (scratch / f"shard-{len(tries)}").write_text("1")
        (output / "half").write_text("1")
        if len(tries) < 3:
            raise Transient("the connection broke")

    work(monkeypatch, does)
    stages.cached(store, STAGE, {}, {})
    assert tries == [0, 1, 2]


def test_a_result_that_the_store_does_not_take_is_not_made_again(store, pod, monkeypatch):
    made, put = [], store.put
    work(monkeypatch, lambda scratch, output: (made.append(1), (output / "made").write_text("1")))

    def away(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(store, "put", put)
        raise Unreachable("cannot write blobs/…: it answered HTTP 503")

    monkeypatch.setattr(store, "put", away)
    assert not stages.cached(store, STAGE, {}, {}).hit and made == [1]


def test_other_trouble_is_not_tried_again(store, pod, monkeypatch):
    tries = []

    def does(scratch: Path, output: Path) -> None:
        tries.append(1)
        raise StageError("a defect")

    work(monkeypatch, does)
    with pytest.raises(StageError):
        stages.cached(store, STAGE, {}, {})
    assert tries == [1]
