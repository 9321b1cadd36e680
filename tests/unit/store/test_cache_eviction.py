"""What leaves the cache of a node, what never does, and the bytes that a collection gives back."""

from __future__ import annotations

import os
import subprocess
import time
from datetime import UTC, datetime, timedelta

import pytest
from trees import child

from trimtab.base.errors import InputError
from trimtab.store import cache, open_store
from trimtab.store.garbage import collect

LATER = datetime.now(UTC) + timedelta(days=30)


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return open_store(str(tmp_path / "store"))


def brought(local, *trees) -> list[bool]:
    return [(cache.cache_folder() / "trees" / tree.digest).is_dir() for tree in trees]


def put(local, name: str, size: int = 1_000_000):
    """A tree that another process put and brought: this one uses nothing."""
    code = """store = open_store(sys.argv[1])
folder = pathlib.Path(sys.argv[2]); folder.mkdir(parents=True)
(folder / "w.bin").write_bytes(os.urandom(int(sys.argv[3])))
tree = store.put(folder, kind=folder.name)
store.get(tree); print(tree.digest)"""
    done = child(code, local.uri, local._back.root.parent / "made" / name, size)
    return local.tree(done.communicate()[0].strip())


def unlinked(local) -> None:
    """Makes the cache's files its own, as where the store is elsewhere."""
    for path in (cache.cache_folder() / "trees").rglob("w.bin"):
        data = path.read_bytes()
        path.parent.chmod(0o755)
        path.unlink()
        path.write_bytes(data)


def aged(local, tree, days: float) -> None:
    when = time.time() - days * 86_400
    os.utime(cache.cache_folder() / "trees" / tree.digest, (when, when))


def du(*folders) -> int:
    command = ["du", "-s", "-c", "--block-size=1", *map(str, folders)]
    return int(subprocess.check_output(command, text=True).split()[-2])


@pytest.mark.parametrize("size", [12_345, 5_000_000])
def test_what_a_collection_says_it_frees_is_what_du_says(local, size):
    put(local, "dropped", size)
    kept = put(local, "kept", size)
    local.release("chat", {"tree": kept.model_dump()})
    before = du(local._back.root, cache.cache_folder())
    planned = collect(local, dry_run=True, now=LATER)
    assert collect(local, now=LATER) == planned
    freed = before - du(local._back.root, cache.cache_folder())
    assert planned.linked == 0 and planned.bytes >= size
    assert abs(freed - planned.bytes) <= 32_768, "but for folders, markers and locks"
    local.examine(kept)


def test_what_a_process_uses_stays_in_the_cache_and_is_not_called_free(local):
    tree = put(local, "used")
    code = "open_store(sys.argv[1]).get(sys.argv[2]); print('has it', flush=True); time.sleep(60)"
    held = child(code, local.uri, tree.uri)
    assert held.stdout.readline()
    planned = collect(local, now=LATER)
    assert brought(local, tree) == [True]
    assert planned.linked >= 1_000_000 and planned.bytes < 100_000
    held.kill()
    held.wait()
    assert cache.evict(tree.digest) and brought(local, tree) == [False]


def test_what_was_not_used_for_long_goes(local):
    old, used = put(local, "old"), put(local, "used")
    aged(local, old, 15)
    aged(local, used, 15)
    local.get(used)
    new = put(local, "new")
    assert brought(local, old, used, new) == [False, True, True]


def test_the_longest_unused_goes_first_where_there_is_too_much(local, monkeypatch):
    first, second, third = (put(local, name) for name in ("first", "second", "third"))
    for tree, days in ((first, 3), (second, 1), (third, 2)):
        aged(local, tree, days)
    unlinked(local)
    aged(local, first, 3), aged(local, second, 1), aged(local, third, 2)
    monkeypatch.setenv(cache.SIZE, "0.0015")
    new = put(local, "new")
    assert brought(local, first, second, third, new) == [False, True, False, True]


def test_links_take_no_room(local, monkeypatch):
    """Of files that a local store has too, nothing is gained by removing one name."""
    trees = [put(local, name) for name in ("first", "second")]
    monkeypatch.setenv(cache.SIZE, "0.0001")
    put(local, "third")
    assert brought(local, *trees) == [True, True]


def test_old_scratch_goes(local):
    scratch = cache.cache_folder() / "scratch"
    for name, days in (("old", 15), ("young", 1)):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "checkpoint").write_text("x")
        when = time.time() - days * 86_400
        for path in (scratch / name / "checkpoint", scratch / name):
            os.utime(path, (when, when))
    put(local, "x")
    assert sorted(path.name for path in scratch.iterdir()) == ["young"]


def test_a_size_that_is_none(local, monkeypatch):
    monkeypatch.setenv(cache.SIZE, "much")
    folder = local._back.root.parent / "made"
    folder.mkdir()
    (folder / "w").write_text("w")
    with pytest.raises(InputError, match="TRIMTAB_CACHE_GB: 'much' is not valid; write a number of gigabytes"):
        local.get(local.put(folder, kind="x"))


# --- what a release keeps --------------------------------------------------------------------------------------


def test_what_a_release_was_made_of_on_the_way_goes(local):
    """Teachers' logits and Gram matrices are large, and nothing judges by them."""
    gram, answers = (local.put_json(name, {"content": name}) for name in ("gram", "answers"))
    document = {"intermediate": {"gram": gram.model_dump()}, "measured": {"look-1": answers.model_dump()}}
    local.release("chat", {"evidence": local.put_json("evidence", document).model_dump()})
    assert collect(local, now=LATER).kinds == {"gram": 1}
    local.examine(answers)


def test_a_withdrawn_release_keeps_nothing_and_its_version_is_not_given_again(both):
    first, second = (both.put_json(name, {"content": name}) for name in ("first", "second"))
    uris = [both.release("chat", {"artifact": tree.model_dump()}) for tree in (first, second)]
    both.withdraw(uris[1], "it answers in French")
    both.withdraw(both.release("other", {"artifact": second.model_dump()}), "a mistake")
    assert both.newest("chat") == uris[0] and [entry["uri"] for entry in both.releases("chat")] == uris[:1]
    with pytest.raises(InputError, match="was withdrawn on .*: it answers in French"):
        both.read_release(uris[1])
    assert both.withdrawn("chat")["000002"]["artifact"] == second.digest[:12]
    assert both.newest("other") is None and both.names() == ["chat", "other"]
    assert collect(both, now=LATER).kinds == {"second": 1}
    assert both.release("chat", {}).endswith("/chat/000003")


def test_work_without_a_scratch_runs_on_a_cache_that_may_only_be_read(local, monkeypatch):
    def refused(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "_lock", refused)
    with cache.scratch("key", lambda: None) as folder:
        assert folder == cache.cache_folder() / "scratch" / "key"
