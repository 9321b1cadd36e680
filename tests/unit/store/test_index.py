"""The store: its cache, its index and its releases, also under many writers."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from trees import KEY, child, contents, delete, fill

from trimtab.base.errors import InputError
from trimtab.store import open_store

# ------------------------------------------------------------------------------------------------------------ the cache


def test_cache_is_filled_once_by_concurrent_processes(store, tmp_path):
    files = {str(n): random.Random(n).randbytes(200_000) for n in range(10)}
    tree = store.put(fill(tmp_path / "in", files), kind="x")
    code = """
store = open_store(sys.argv[1])
fetch = store._back.fetch
store._back.fetch = lambda key, *rest: os.write(1, key.encode() + b" ") and fetch(key, *rest)
path = store.get(sys.argv[2])
assert len(list(path.iterdir())) == 10
"""
    processes = [child(code, store.uri, tree.uri) for _ in range(4)]
    outputs = [process.communicate(timeout=30)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(map(len, outputs)) == [0, 0, 0, 10]
    # A tree in the cache needs no store.
    delete(store, f"trees/{tree.digest}.json")
    assert contents(store.get(tree)) == files


def test_cache_in_threads(store, tmp_path):
    tree = store.put(fill(tmp_path / "in"), kind="x")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: store.get(tree), range(8)))) == 1


def test_unwritable_cache(store, tmp_path, monkeypatch):
    tree = store.put(fill(tmp_path / "in"), kind="x")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(InputError, match="TRIMTAB_CACHE.* is not a folder"):
        store.get(tree)


# --------------------------------------------------------------------------------------------------- index and releases


def test_index(store, tmp_path):
    assert store.lookup(KEY) is None
    store.record(KEY, {"a": 1})
    store.record(KEY, {"a": 2, "ü": [True, None]})
    assert store.lookup(KEY) == {"a": 2, "ü": [True, None]}
    tree = store.put(fill(tmp_path / "in"), kind="x")
    value = {"state": {"trees": [{"engine": tree.to_dict()}], "uri": "hf://model", "digest": "x"}}
    store.record(KEY, value)
    assert store.lookup(KEY) == value
    delete(store, f"trees/{tree.digest}.json")
    assert store.lookup(KEY) is None
    for bad in ("", "../" + KEY[3:], KEY.upper(), KEY + "\n", KEY[:-1]):
        with pytest.raises(InputError, match="64 hex digits"):
            store.record(bad, {})
    with pytest.raises(InputError, match="not JSON"):
        store.record(KEY, {"x": float("inf")})


def test_index_follows_trees_of_other_stores(store, tmp_path):
    other = open_store(tmp_path / "other")
    tree = other.put(fill(tmp_path / "in"), kind="x")
    store.record(KEY, {"tree": tree.to_dict()})
    assert store.lookup(KEY) == {"tree": tree.to_dict()}
    delete(other, f"trees/{tree.digest}.json")
    assert store.lookup(KEY) is None


def test_index_under_concurrent_writers(store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.record(KEY, {"n": n, "pad": "x" * 1000}), range(24)))
    assert store.lookup(KEY)["n"] in range(24)


def test_releases(store):
    assert store.releases("chat") == []
    uris = [store.release("chat", {"n": n}) for n in range(3)]
    assert uris == [f"{store.uri}/releases/chat/{n:06d}" for n in (1, 2, 3)]
    assert store.release("chat-2", {}) == f"{store.uri}/releases/chat-2/000001"
    assert store.read_release(uris[1]) == {"n": 1}
    expected = [{"uri": uri, "version": uri[-6:], "record": {"n": n}} for n, uri in enumerate(uris)]
    assert store.releases("chat") == expected
    for bad in ("", "a/b", "..", ".hidden", "a b"):
        with pytest.raises(InputError, match="release name"):
            store.release(bad, {})
    for bad in (f"{store.uri}/releases/chat/000009", f"{store.uri}/releases/../index", "s3://other/releases/a/1"):
        with pytest.raises(InputError, match="no release|not a release"):
            store.read_release(bad)


def test_release_numbers_under_concurrent_writers(store):
    code = """
store = open_store(sys.argv[1])
for n in range(3):
    print(store.release("chat", {"by": sys.argv[2], "n": n}))
"""
    processes = [child(code, store.uri, n) for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        uris = list(pool.map(lambda n: store.release("chat", {"by": "thread", "n": n}), range(8)))
    for process in processes:
        uris += process.communicate(timeout=30)[0].split()
    assert sorted(uris) == [f"{store.uri}/releases/chat/{n:06d}" for n in range(1, 21)]
    assert len({json.dumps(release["record"]) for release in store.releases("chat")}) == 20
