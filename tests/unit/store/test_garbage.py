"""What is collected and what never is; and that those who write, read and collect do not get in each other's way."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from trimtab.base.errors import Damaged, InputError, StoreError
from trimtab.store import garbage as module
from trimtab.store import leases, open_store
from trimtab.store.clock import Late
from trimtab.store.garbage import collect

KEY = "ab" * 32
#: A month from now everything that is there is old.
LATER = datetime.now(UTC) + timedelta(days=30)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """An empty store in a folder, whose objects can be made old."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return open_store(str(tmp_path / "store"))


def age(store, days: float = 30) -> None:
    """Makes everything older."""
    for path in store._back.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * 86_400,) * 2)


def filed(store, name: str, key: str = ""):
    """A tree with content of its own, found under a key."""
    tree = store.put_json(name, {"content": name})
    if key:
        store.record(key, {"tree": tree.model_dump(), "metrics": {}, "seconds": 1.0})
    return tree


def there(store, *trees) -> list[bool]:
    return [store._back.modified(f"trees/{tree.digest}.json") is not None for tree in trees]


def keys(store) -> set[str]:
    folders = ("trees", "blobs", "index", "releases", "pins", "leases")
    return {entry.key for folder in folders for entry in store._back.entries(folder)}


def test_what_a_release_refers_to_stays(both):
    """Through its evidence too, which is a document in a tree."""
    answers, calibration, artifact = (filed(both, name) for name in ("answers", "calibration", "artifact"))
    evidence = both.put_json("evidence", {"measured": {"look-1": answers.model_dump()}, "t": [calibration.uri]})
    both.release("chat", {"artifact": artifact.model_dump(), "evidence": evidence.model_dump()})
    kept, dropped = filed(both, "kept", KEY), filed(both, "dropped", "cd" * 32)
    both.release("chat-2", {"artifact": kept.model_dump()})
    planned = collect(both, dry_run=True, now=LATER)
    assert there(both, dropped) == [True], "a dry run removes nothing"
    assert planned.kinds == {"dropped": 1} and planned.kept == 5
    assert (len(planned.manifests), len(planned.records), len(planned.blobs)) == (1, 1, 1) and planned.bytes > 0
    before = keys(both)
    assert collect(both, now=LATER) == planned
    assert before - keys(both) == {*planned.manifests, *planned.records, *planned.blobs}
    for tree in (answers, calibration, artifact, evidence, kept):
        both.examine(tree)
    assert both.lookup(KEY) and both.lookup("cd" * 32) is None
    with pytest.raises(Damaged, match="there is no tree"):
        both.get(dropped)
    assert collect(both, now=LATER).manifests == (), "nothing is left to do"


def test_a_blob_that_a_kept_tree_shares_stays(both):
    document = {"content": "the same"}
    dropped, kept = both.put_json("x", document), both.put_json("x", {"other": 1})
    shared = both.put(both.get(dropped), kind="y")
    both.release("chat", {"a": kept.uri, "b": shared.digest})
    assert len(collect(both, now=LATER).manifests) == 1
    assert both.get_json("x", shared) == document and both.examine(shared)


def test_young_trees_stay(local):
    """Those of a running attempt, which only the run knows."""
    old = filed(local, "old")
    age(local)
    young = filed(local, "young")
    collect(local)
    assert there(local, old, young) == [False, True]


def test_what_a_run_said_of_itself_goes_with_its_age(both):
    """Beside the results, so that whoever lists these sees results alone."""
    both.write_status("run-1", "attempts", ["accepted"])
    assert not list(both._back.entries("index"))
    assert collect(both, dry_run=True).statuses == () and both.status("run-1", "attempts") == ["accepted"]
    assert collect(both, now=LATER).statuses == ("status/run-1/attempts.json",)
    assert both.status("run-1", "attempts") is None


@pytest.mark.parametrize("use", ["lookup", "put"])
def test_what_is_used_again_is_young_again(local, use):
    used, unused = filed(local, "used", KEY), filed(local, "unused", "cd" * 32)
    age(local)
    assert local.lookup(KEY) if use == "lookup" else filed(local, "used") == used
    garbage = collect(local)
    assert there(local, used, unused) == [True, False]
    local.examine(used)
    assert len(garbage.records) == 1 and local.lookup("cd" * 32) is None


def test_what_was_used_yesterday_is_not_written_again(local):
    tree = filed(local, "x", KEY)
    age(local, days=0.5)
    before = (local._back.root / f"trees/{tree.digest}.json").stat().st_ino
    assert local.lookup(KEY) and filed(local, "x") == tree
    assert (local._back.root / f"trees/{tree.digest}.json").stat().st_ino == before


def test_pins(both):
    """What a schedule refers to."""
    answers = filed(both, "answers")
    pinned, tree = both.put_json("student", {"tree": answers.uri}), filed(both, "x")
    both.pin("nightly", [pinned])
    collect(both, now=LATER)
    assert there(both, pinned, answers, tree) == [True, True, False]
    both.unpin("nightly")
    both.unpin("nightly")
    collect(both, now=LATER)
    assert there(both, pinned, answers) == [False, False]
    with pytest.raises(Damaged, match="there is no tree"):
        both.pin("nightly", [pinned])
    with pytest.raises(InputError, match="the pin name '../x' is not valid"):
        both.pin("../x", [])
    with pytest.raises(InputError, match="until: .* has no time zone"):
        both.pin("nightly", [], until=datetime(2030, 1, 1))


def test_a_pin_that_has_ended(local):
    trees = [filed(local, name) for name in ("ended", "lasting")]
    for tree, days in zip(trees, (1, 60), strict=True):
        local.pin(f"by-{days}", [tree], until=datetime.now(UTC) + timedelta(days=days))
    collect(local, now=LATER)
    assert there(local, *trees) == [False, True]


def test_an_age_that_a_run_may_exceed(local):
    with pytest.raises(InputError, match="older_than: 1 days is too short, .* write 2d or more"):
        collect(local, age=timedelta(days=1))


@pytest.mark.parametrize("what", ["release", "evidence"])
def test_nothing_is_removed_where_references_are_unknown(local, what):
    artifact, dropped = filed(local, "artifact"), filed(local, "dropped")
    local.release("chat", {"artifact": artifact.uri})
    age(local)
    manifest = local.manifest(artifact)
    (blob,) = (blob.sha256 for blob in manifest.files.values())
    path = local._back.root / (f"blobs/{blob[:2]}/{blob}" if what == "evidence" else "releases/chat/000001.json")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Damaged, match="not known: nothing is removed"):
        collect(local)
    assert there(local, artifact, dropped) == [True, True]


def test_a_collection_that_is_killed(local, monkeypatch):
    """What stays is whole, what goes may be half gone, and the next collection ends it."""
    kept = filed(local, "kept")
    local.release("chat", {"artifact": kept.uri})
    dropped = [filed(local, f"dropped-{n}", f"{n:064x}") for n in range(8)]
    age(local)
    remove, left = local._back.remove, [5, threading.Lock()]

    def killed(key: str, before: float | None = None) -> None:
        with left[1]:
            if key.startswith(("blobs", "trees", "index")):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
        remove(key)

    monkeypatch.setattr(local._back, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(local)
    monkeypatch.undo()
    local.examine(kept)
    found = [local._back.read(f"index/{n:064x}.json") is not None for n in range(8)]
    assert sum(found) == 3 and all(there(local, *dropped)), "results went first"
    collect(local)
    assert not any(there(local, *dropped)) and local.examine(kept)
    assert sum(key.startswith("blobs") for key in keys(local)) == 1


# --- at the same time ---------------------------------------------------------------------------------------


def test_a_put_under_way_is_waited_for_and_then_left_alone(both, monkeypatch):
    monkeypatch.setattr(leases, "WAIT", 0.0)
    with leases.working(both._back), pytest.raises(StoreError, match=r"1 processes write to .* when they are done"):
        collect(both, now=LATER)
    assert not leases.is_collecting(both._back)
    assert collect(both, now=LATER).kept == 0


def test_a_put_waits_for_a_collection(both):
    with ThreadPoolExecutor(1) as pool:
        with leases.collecting(both._back):
            put = pool.submit(filed, both, "x")
            time.sleep(0.5)
            assert not put.done() and both._back.entries("trees") == []
            with pytest.raises(StoreError, match="is being collected already"), leases.collecting(both._back):
                pass
        both.examine(put.result(timeout=30))


def test_what_the_dead_left_behind_ends(local):
    local._back.prepare()
    ended = leases._document(time.time() - leases.MARGIN.total_seconds() - 1)
    local._back.write("collecting/000000007.json", ended)
    local._back.write("leases/dead.json", ended)
    filed(local, "x")
    assert len(collect(local, now=LATER).manifests) == 1
    assert local._back.names("leases") == [] and local._back.names("collecting") == ["000000008.json"]


def test_a_right_is_not_over_before_every_clock_says_so(local):
    """That of the machine which looks may go before the store's."""
    local._back.prepare()
    local._back.write("leases/slow.json", leases._document(time.time() - leases.MARGIN.total_seconds() + 60))
    with pytest.raises(StoreError, match="1 processes write to"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "WAIT", 0.0)
        collect(local, now=LATER)


# --- machines that sleep, and two that collect ------------------------------------------------------------------


def test_two_collections_over_the_marker_of_a_dead_one(both):
    """Both find it ended; one takes the next number, and the other is refused, however slow it was."""
    both._back.prepare()
    both._back.write("collecting/000000001.json", leases._document(0.0))
    last = leases._last
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "_last", lambda back: (1, False) if back is not both._back else last(back))
        slow = open_store(both.uri)
        with leases.collecting(both._back), pytest.raises(StoreError, match="collected already"):
            collect(slow, now=LATER)
        with leases.collecting(both._back):
            pass  # a third one, which removes the number that the slow one believes free
        with pytest.raises(StoreError, match="collected already"):
            patch.setattr(leases, "_last", _believes(last, slow._back, (1, False)))
            collect(slow, now=LATER)


def _believes(last, back, said):
    """At its first look, what was so long ago."""
    told = [said]
    return lambda asked: told.pop() if asked is back and told else last(asked)


def test_a_collection_whose_machine_slept(both, monkeypatch):
    """It decided what to remove and slept; meanwhile another put the same tree, and it removes nothing of it."""
    tree = filed(both, "x")

    def slept(back, garbage, right):
        right.until = time.time() - 3600  # it has not noticed
        monkeypatch.setattr(right, "keep_up", lambda: None)
        return removed(back, garbage, right)

    removed = module._remove
    monkeypatch.setattr(module, "_remove", slept)
    with pytest.raises(Late, match="has run out"):
        collect(both, now=LATER)
    both.examine(tree)


def test_a_server_refuses_what_was_signed_before_it_slept(both):
    """The look at the clock was in time, and sending it was not."""
    if both.uri.startswith("file:"):
        pytest.skip("a folder has a lock instead")
    tree = filed(both, "x")
    key = f"trees/{tree.digest}.json"
    sign = both._back._client.get_presigned_url

    def slow(*given, **named):
        url = sign(*given, **named)
        time.sleep(2.5)
        return url

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(both._back._client, "get_presigned_url", slow)
        with pytest.raises(Late):
            both._back.remove(key, before=time.time() + 1.5)
        with pytest.raises(Late):
            both._back.write(key, b"{}", before=time.time() + 1.5)
    both.examine(tree)
    both._back.remove(key, before=time.time() + 60)
    assert there(both, tree) == [False]


def test_a_collection_that_is_suspended_keeps_its_lock(local):
    """In a folder its time may end as it likes: who would put waits until the process goes on or ends."""
    with ThreadPoolExecutor(1) as pool:
        with leases.collecting(local._back) as right:
            local._back.write(right._key, leases._document(0.0))
            put = pool.submit(filed, open_store(local.uri), "x")
            time.sleep(0.5)
            assert not put.done() and local._back.entries("trees") == []
        assert put.result(timeout=30)


def test_a_put_whose_machine_slept(both, monkeypatch):
    """Its lease had ended and old content that it counted on was collected: it is put again."""
    filed(both, "x")
    slept = []
    add = type(both._back).add

    def slow(self, *given):
        checksum = add(self, *given)
        if not slept:
            slept.append(True)
            for name in self.names("leases"):
                self.write(f"leases/{name}", leases._document(0.0))
            for entry in [*self.entries("trees"), *self.entries("blobs")]:
                self.remove(entry.key)  # what a collection would do now
            monkeypatch.setattr(leases.Right, "check", _once_late(leases.Right.check))
        return checksum

    monkeypatch.setattr(type(both._back), "add", slow)
    both.examine(filed(both, "x"))


def _once_late(check):
    left = [True]

    def late(self):
        if left.pop() if left else False:
            raise Late("the lease has run out")
        check(self)

    return late


def test_a_lease_is_renewed(local, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL", timedelta(0))
    with leases.working(local._back) as lease:
        first = lease.until
        time.sleep(0.01)
        lease.keep_up()
        assert lease.until > first
        (name,) = local._back.names("leases")
        assert local._back.read(f"leases/{name}") == lease.document
        lease.until = 0.0
        with pytest.raises(Late):
            lease.keep_up()


def test_a_reader_during_a_collection(both, tmp_path, monkeypatch):
    """What is kept is read whole; what goes is read whole or not at all."""
    for name in ("kept", "dropped"):
        (tmp_path / name).mkdir()
        for n in range(20):
            (tmp_path / name / str(n)).write_bytes(f"{name} {n}".encode() * 5000)
    kept, dropped = (both.put(tmp_path / name, kind="x") for name in ("kept", "dropped"))
    both.release("chat", {"artifact": kept.uri})

    def read(tree) -> int:
        try:
            return len(list(open_store(both.uri).get(tree).iterdir()))
        except Damaged:
            return 0

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, tree) for tree in (kept, dropped)]
        pool.submit(collect, both, now=LATER).result()
    assert readers[0].result() == 20 and readers[1].result() in (0, 20)
    assert list((tmp_path / "cache").glob(".partial/*")) == []


def test_puts_and_collections_in_turn(local):
    """Trees that are put out of old blobs while garbage is collected again and again: none ever lacks one."""
    for n in range(6):
        filed(local, f"part-{n}")
    age(local)
    ended = threading.Event()

    def put(worker: int) -> list:
        return [local.put_json(f"part-{n}", {"content": f"part-{n}"}) for n in range(6) if n % 3 == worker]

    def again_and_again() -> int:
        count = 0
        while not ended.is_set():
            collect(open_store(local.uri))
            time.sleep(0.05)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        collector = pool.submit(again_and_again)
        made = [tree for trees in pool.map(put, range(3)) for tree in trees]
        ended.set()
        assert collector.result(timeout=60) > 0
    for tree in made:
        local.examine(tree)
