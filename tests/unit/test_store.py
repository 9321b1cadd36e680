"""The store: one table of cases, each on a folder and on a real S3 server."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.errors import InputError, StoreError
from trimtab.schema import digest
from trimtab.store import Tree, open_store
from trimtab.store.local import blob_key

FILES = {"config.json": b"{}", "empty": b"", "a/b/c/weights.bin": random.Random(7).randbytes(3 << 20)}
KEY = "ab" * 32


@pytest.fixture
def store(both):
    """Every case is one of a folder and one of S3."""
    return both


def is_local(store) -> bool:
    return store.uri.startswith("file:")


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects(store) -> dict[str, object]:
    """Everything in the store with a stamp that changes when it is written again."""
    back = store._back
    if is_local(store):
        files = [p for p in back.root.rglob("*") if p.is_file()]
        return {p.relative_to(back.root).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
    listed = back._client.list_objects(back.bucket, prefix=back.prefix + "/", recursive=True)
    return {item.object_name.removeprefix(back.prefix + "/"): item.last_modified for item in listed}


def delete(store, key: str) -> None:
    back = store._back
    if is_local(store):
        (back.root / key).unlink()
    else:
        back._client.remove_object(back.bucket, back._key(key))


def blob_of(store, tree: Tree, path: str) -> str:
    return blob_key(store.manifest(tree).files[path].sha256)


def is_clean(tmp_path: Path) -> bool:
    """Nothing temporary is left in the store's or the cache's folder."""
    return not [p for root in ("store", "cache") for p in (tmp_path / root / ".partial").glob("*")]


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
    code = "import os, sys, time, pathlib\nfrom trimtab.store import open_store\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------------------------------------------- trees


def test_round_trip(store, tmp_path):
    metadata = {"model": "smol", "n": [1, 2.5, None]}
    tree = store.put(fill(tmp_path / "in"), kind="checkpoint", metadata=metadata)
    assert tree.uri == f"{store.uri}/trees/{tree.digest}"
    assert tree.bytes == sum(map(len, FILES.values()))
    for given_tree in (tree, tree.uri):
        path = store.get(given_tree)
        assert contents(path) == FILES
    manifest = store.manifest(tree.uri)
    assert (manifest.kind, manifest.metadata) == ("checkpoint", metadata)
    sums = {p: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for p, data in FILES.items()}
    assert manifest.document["files"] == sums
    assert tree.digest == digest({"kind": "checkpoint", "metadata": manifest.metadata, "files": sums})
    assert {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()} == {0o444}
    assert {p.stat().st_mode & 0o777 for p in [path, *path.rglob("*")] if p.is_dir()} == {0o555}
    assert "python" + "3" not in tree.uri + str(path).removeprefix(str(tmp_path))


def test_same_content_is_sent_once(store, tmp_path):
    first = store.put(fill(tmp_path / "in"), kind="checkpoint")
    before = objects(store)
    assert store.put(fill(tmp_path / "again"), kind="checkpoint") == first
    assert objects(store) == before
    other = store.put(tmp_path / "in", kind="checkpoint", metadata={"why": "another"})
    assert other.digest != first.digest
    assert set(objects(store)) - set(before) == {f"trees/{other.digest}.json"}
    assert store.manifest(first).metadata == {} and store.manifest(other).metadata == {"why": "another"}
    assert sum(key.startswith("blobs/") for key in before) == len(FILES)


def test_twins_within_a_tree(store, tmp_path):
    tree = store.put(fill(tmp_path / "in", {str(n): b"same" for n in range(20)}), kind="x")
    assert sum(key.startswith("blobs/") for key in objects(store)) == 1
    assert len(contents(store.get(tree))) == 20 and is_clean(tmp_path)


def test_empty_folder(store, tmp_path):
    (tmp_path / "in").mkdir()
    assert contents(store.get(store.put(tmp_path / "in", kind="x"))) == {}


def test_large_file_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.store.local.LARGE", 1 << 20)
    monkeypatch.setattr("trimtab.store.s3.WHOLE", 1 << 20)
    seen = []
    data = random.Random(1).randbytes((20 << 20) + 17)
    folder = fill(tmp_path / "in", {"big": data, "small": b"1"})
    tree = store.put(folder, kind="x", progress=lambda *c: seen.append(c))
    assert seen == sorted(seen) and seen[-1] == (len(data) + 1, len(data) + 1) and len(seen) > 2
    assert contents(store.get(tree)) == {"big": data, "small": b"1"}
    before = objects(store)
    assert open_store(store.uri).put(folder, kind="x") == tree
    assert objects(store) == before


@pytest.mark.parametrize("after", [b"2" * 1000, b"1" * 1001, b""])
def test_a_file_that_changes_while_it_is_read_as_a_whole(tmp_path, monkeypatch, after):
    from trimtab.store import transfer

    (tmp_path / "log").write_bytes(b"1" * 1000)
    looks, look = [], os.fstat

    def edited_in_between(file):
        looks.append(file)
        if len(looks) == 2:
            (tmp_path / "log").write_bytes(after)
            os.utime(tmp_path / "log", ns=(0, look(file).st_mtime_ns + 1))
        return look(file)

    monkeypatch.setattr(transfer.os, "fstat", edited_in_between)
    with pytest.raises(StoreError, match="log changed while it was read"):
        transfer.read_whole(tmp_path / "log", 1000)
    monkeypatch.undo()
    assert transfer.read_whole(tmp_path / "log", len(after)) == after
    with pytest.raises(StoreError, match="log changed while it was read"):
        transfer.read_whole(tmp_path / "log", len(after) + 1)


def test_large_local_file_is_read_once(tmp_path, monkeypatch):
    from trimtab.store import local

    monkeypatch.setattr(local, "LARGE", 1)
    read = []
    chunks = local.chunks
    monkeypatch.setattr(local, "chunks", lambda path: read.append(path.name) or chunks(path))
    folder = fill(tmp_path / "in", {"new": b"12345"})
    open_store(tmp_path / "store").put(folder, kind="x")
    assert read == ["new"]


def test_local_get_takes_no_space(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    store = open_store(tmp_path / "store")
    tree = store.put(fill(tmp_path / "in"), kind="x")
    blob = tmp_path / "store" / blob_of(store, tree, "a/b/c/weights.bin")
    assert (store.get(tree) / "a/b/c/weights.bin").samefile(blob)
    # A later edit of the source leaves the blob alone.
    (tmp_path / "in/a/b/c/weights.bin").write_bytes(b"edited")
    assert blob.stat().st_size == 3 << 20


def test_get_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path / "store")
    tree = store.put(fill(tmp_path / "in"), kind="x", move=True)
    assert contents(store.get(tree)) == FILES
    assert store.release("r", {}).endswith("/000001") and store.release("r", {}).endswith("/000002")
    assert is_clean(tmp_path)


def test_move(store, tmp_path):
    folder = fill(tmp_path / "in")
    inode = (folder / "a/b/c/weights.bin").stat().st_ino
    tree = store.put(folder, kind="x", move=True)
    assert contents(folder) == {}
    assert contents(store.get(tree)) == FILES and is_clean(tmp_path)
    if is_local(store):
        blob = tmp_path / "store" / blob_of(store, tree, "a/b/c/weights.bin")
        assert blob.stat().st_ino == inode and blob.stat().st_mode & 0o777 == 0o444
    assert store.put(fill(tmp_path / "in"), kind="x", move=True) == tree
    assert contents(folder) == {}


def test_a_put_that_is_killed_leaves_nothing_visible(store, tmp_path):
    files = {f"{n:02}": random.Random(n).randbytes(2 << 20) for n in range(12)}
    folder = fill(tmp_path / "in", files)
    # Hangs in the middle of the tenth of 24 MiB, with files both complete and half written.
    code = """
def progress(done, total):
    if done > 10 << 20:
        print("half", flush=True)
        time.sleep(60)
open_store(sys.argv[1]).put(sys.argv[2], kind="x", progress=progress)
"""
    process = child(code, store.uri, folder)
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    before = objects(store)
    assert not [key for key in before if key.startswith("trees/")]
    if is_local(store):
        assert not is_clean(tmp_path)
    tree = open_store(store.uri).put(folder, kind="x")
    after = objects(store)
    assert contents(store.get(tree)) == files and is_clean(tmp_path)
    done = {key: stamp for key, stamp in before.items() if key.startswith("blobs/")}
    assert done.items() <= after.items()


def test_a_get_that_is_killed_is_resumed(store, tmp_path):
    files = {f"{n:02}": random.Random(n).randbytes(2 << 20) for n in range(12)}
    tree = store.put(fill(tmp_path / "in", files), kind="x")
    code = """
def progress(done, total):
    if done > 18 << 20:
        print("half", flush=True)
        time.sleep(60)
open_store(sys.argv[1]).get(sys.argv[2], progress=progress)
"""
    process = child(code, store.uri, tree.uri)
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    fetched = []
    fetch = store._back.fetch
    store._back.fetch = lambda key, *rest: fetched.append(key) or fetch(key, *rest)
    assert not (tmp_path / "cache/trees").exists()
    assert contents(store.get(tree)) == files
    assert len(fetched) < 12 and is_clean(tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_blob_is_named(store, tmp_path, damage):
    tree = store.put(fill(tmp_path / "in"), kind="x")
    key = blob_of(store, tree, "a/b/c/weights.bin")
    data = FILES["a/b/c/weights.bin"]
    delete(store, key)
    if damage != "gone":
        store._back.write(key, data[:-1] + b"!" if damage == "flipped" else data[:1000])
    with pytest.raises(StoreError, match=r"'a/b/c/weights.bin' .* is (corrupted|missing)"):
        store.get(tree)
    assert not list((tmp_path / "cache").glob("trees/*")) and is_clean(tmp_path)
    if damage == "flipped":
        delete(store, key)
    # What the message says: putting the tree again heals it.
    assert store.put(tmp_path / "in", kind="x") == tree
    assert contents(store.get(tree)) == FILES


def test_missing_and_damaged_manifest(store, tmp_path):
    tree = store.put(fill(tmp_path / "in"), kind="x")
    key = f"trees/{tree.digest}.json"
    for text, message in ((b"{", "damaged"), (b'{"kind":"y","files":{}}', "another digest")):
        store._back.write(key, text)
        with pytest.raises(StoreError, match=message):
            store.get(tree)
    delete(store, key)
    with pytest.raises(StoreError, match="there is no tree"):
        store.get(tree)


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a//b", ".", "", "a\\b", "a\0b"])
def test_path_traversal_is_refused(store, tmp_path, path):
    files = {path: {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}}
    manifest = {"kind": "x", "metadata": {}, "files": files}
    store._back.prepare()
    store._back.write(f"trees/{digest(manifest)}.json", json.dumps(manifest).encode())
    with pytest.raises(StoreError, match="not a plain path"):
        store.get(f"{store.uri}/trees/{digest(manifest)}")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("checksum", ["../../../../etc/passwd", "AB" * 32, "ab" * 32 + "\n"])
def test_checksum_in_manifest_is_validated(store, checksum):
    manifest = {"kind": "x", "metadata": {}, "files": {"a": {"sha256": checksum, "bytes": 0}}}
    store._back.prepare()
    store._back.write(f"trees/{digest(manifest)}.json", json.dumps(manifest).encode())
    with pytest.raises(StoreError, match="damaged"):
        store.get(f"{store.uri}/trees/{digest(manifest)}")


def test_links(store, tmp_path):
    folder = fill(tmp_path / "in", {"real/file": b"data"})
    (folder / "link").symlink_to("real/file")
    (folder / "real/up").symlink_to(folder / "link")
    expected = {"real/file": b"data", "link": b"data", "real/up": b"data"}
    tree = store.put(folder, kind="x")
    path = store.get(tree)
    assert contents(path) == expected and not any(p.is_symlink() for p in path.rglob("*"))
    assert store.put(folder, kind="x", move=True) == tree
    assert contents(folder) == {}


def test_refused_folders(store, tmp_path):
    (tmp_path / "outside").write_text("secret")
    cases = {
        "leaves the folder": lambda folder: (folder / "x").symlink_to("../outside"),
        "leaves the folder ": lambda folder: (folder / "x").symlink_to("/etc/hostname"),
        "leads to no file": lambda folder: (folder / "x").symlink_to("nothing"),
        "leads to no file ": lambda folder: (folder / "x").symlink_to("."),
        "neither a file nor a folder": lambda folder: os.mkfifo(folder / "x"),
        "UTF-8": lambda folder: open(os.fsencode(folder) + b"/\xff", "w").close(),
    }
    for number, (message, make) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder)
        with pytest.raises(InputError, match=message.strip()):
            store.put(folder, kind="x")
    for missing in (tmp_path / "nowhere", tmp_path / "outside"):
        with pytest.raises(InputError, match="is not a folder"):
            store.put(missing, kind="x")
    for metadata in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}, [1]):
        with pytest.raises(InputError, match="metadata"):
            store.put(fill(tmp_path / "in"), kind="x", metadata=metadata)
    assert objects(store) == {}


@pytest.mark.parametrize("after", [b"2" * 1000, b"1" * 1001, b""])
def test_a_file_that_changes_is_refused(store, tmp_path, monkeypatch, after):
    from trimtab.store.transfer import chunks

    folder = fill(tmp_path / "in", {"log": b"1" * 1000})

    def edited_afterwards(path):
        yield from chunks(path)
        path.write_bytes(after)

    monkeypatch.setattr("trimtab.store.s3.WHOLE", 0)
    for back in ("local", "s3"):
        monkeypatch.setattr(f"trimtab.store.{back}.chunks", edited_afterwards)
    with pytest.raises(StoreError, match="log changed while it was read"):
        store.put(folder, kind="x")
    assert objects(store) == {} and is_clean(tmp_path)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.data())
def test_any_names(store, tmp_path, data):
    letters = st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"])
    part = st.text(letters, min_size=1, max_size=20)
    names = st.lists(part.filter(lambda name: name not in (".", "..")), min_size=1, max_size=4).map("/".join)
    files = data.draw(st.dictionaries(names, st.binary(max_size=50), max_size=5))
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    kept = {}
    for path, content in files.items():
        # A name cannot be a file and a folder at once.
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            fill(folder, {path: content})
            kept[path] = content
    tree = store.put(folder, kind="random", metadata=dict.fromkeys(kept, 1))
    assert contents(store.get(tree)) == kept
    assert store.manifest(tree).metadata == dict.fromkeys(kept, 1)


# ---------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("limit", [1 << 20])
def test_full_disk(store, tmp_path, limit):
    """A real limit on the size of a file, in a process of its own: writes fail in the middle."""
    folder = fill(tmp_path / "in", {"big": random.Random(1).randbytes(8 << 20), "small": b"1"})
    code = """
import resource
from trimtab.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = open_store(sys.argv[1])
try:
    print(store.get(sys.argv[3]) if sys.argv[2] == "get" else store.put(sys.argv[3], kind="x").uri)
except StoreError as error:
    print("StoreError", error)
"""
    if is_local(store):
        output, _ = child(code, store.uri, "put", folder).communicate(timeout=30)
        assert output.startswith("StoreError no space left") and str(tmp_path / "store") in output
        assert not (tmp_path / "store/trees").exists()
    tree = store.put(folder, kind="x")
    process = child("import errno, os\ndef refuse(*_): raise OSError(18, 'x')\nos.link = refuse\n" + code,
                    store.uri, "get", tree.uri)  # fmt: skip
    output, _ = process.communicate(timeout=30)
    assert output.startswith("StoreError no space left") and "TRIMTAB_CACHE" in output
    assert not list((tmp_path / "cache/trees").glob("*")) and is_clean(tmp_path)
    assert store.get(tree).is_dir()


def test_no_space(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(tmp_path / "store")
    monkeypatch.setattr("trimtab.store.local.settle", refuse)
    for action in (lambda: store.put(fill(tmp_path / "in"), kind="x"), lambda: store.release("a", {})):
        with pytest.raises(StoreError, match="no space left .* free some"):
            action()
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------------------ the cache


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


# -------------------------------------------------------------------------------------- index and releases


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


# -------------------------------------------------------------------------------------------- temporary files


def test_only_abandoned_temporary_files_are_removed(tmp_path):
    import fcntl
    import socket

    host, partial = socket.gethostname(), tmp_path / "store/.partial"
    partial.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        "dead": f"{host}.{dead.pid}.00",
        "ours, from an earlier container": f"{host}.{os.getpid()}.00",
        "alive": f"{host}.{os.getppid()}.00",
        "another host": f"another.{dead.pid}.00",
        "locked in another container": f"{host}.{dead.pid}.01",
        "foreign": "notes",
    }
    for name in names.values():
        (partial / name).touch()
    with open(partial / names["locked in another container"], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_store(tmp_path / "store").record(KEY, {})
    left = {what for what, name in names.items() if (partial / name).exists()}
    assert left == {"alive", "another host", "locked in another container", "foreign"}


# ---------------------------------------------------------------------------------------- addresses and check


def test_check(store, tmp_path):
    store.check()
    assert is_clean(tmp_path)


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("/data/store/", "file:///data/store"),
        ("file:///data/a%20b", "file:///data/a%20b"),
        ("/data/a b%", "file:///data/a%20b%25"),
        (Path("/data/x"), "file:///data/x"),
        ("relative", None),
        ("s3://bucket-1", "s3://bucket-1"),
        ("s3://bucket.x/a/b=c/", "s3://bucket.x/a/b=c"),
    ],
)
def test_addresses(address, uri, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    assert open_store(address).uri == (uri or (Path.cwd() / address).as_uri())
    assert open_store(open_store(address).uri).uri == open_store(address).uri


@pytest.mark.parametrize(
    "address", ["", "gs://bucket/x", "minio://b/x", "file://host/x", "s3://", "s3://UP/x", "s3://abc/../x",
                "s3://abc/a//b", "s3://abc/x?y"]
)  # fmt: skip
def test_wrong_addresses(address):
    with pytest.raises(InputError, match="write s3://"):
        open_store(address)


def test_trees_of_another_store(store, tmp_path):
    other = f"{tmp_path}/other/trees/{KEY}"
    with pytest.raises(InputError, match="is in another store than .*: open /"):
        store.get(other)
    for bad in ("", "x", f"{store.uri}/trees/xyz", f"{store.uri}/trees/{KEY}/..", "hf://model"):
        with pytest.raises(InputError, match="is not a tree: write"):
            store.get(bad)


def refused(action, match: str) -> str:
    """Runs an action that must raise InputError in 10 seconds; returns the message, which is one line."""
    start = time.monotonic()
    with pytest.raises(InputError, match=match) as caught:
        action()
    assert time.monotonic() - start < 10
    text = str(caught.value)
    assert "\n" not in text and caught.value.__cause__ is None
    # A traceback would print what the client raised, with signed addresses.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_check_of_folders(tmp_path):
    (tmp_path / "file").write_text("")
    refused(open_store(tmp_path / "file").check, "is not a folder: choose another")
    refused(open_store(tmp_path / "file/below").check, "is not a folder.*choose another")
    refused(lambda: open_store(tmp_path / "file").record(KEY, {}), "is not a folder")
    (tmp_path / "locked").mkdir(mode=0o555)
    # Root may write anywhere; another user may not even enter pytest's folder.
    nobody = os.geteuid() == 0
    if nobody:
        os.seteuid(65534)
    try:
        for path in (tmp_path / "locked", tmp_path / "locked/new"):
            refused(open_store(path).check, "refuses user .*grant it or choose another place")
    finally:
        if nobody:
            os.seteuid(0)


def test_check_of_s3(s3_server, monkeypatch):
    def check(match, bucket=s3_server.bucket, **changes):
        with monkeypatch.context() as patch:
            for name, value in (s3_server.environment | changes).items():
                patch.setenv(name, value)
            text = refused(lambda: open_store(f"s3://{bucket}/x").check(), match)
            for secret in (s3_server.secret, "wrong-secret-xyz", "wrongkeyxyz", s3_server.key):
                assert secret not in text
            return text

    refusing = "http://127.0.0.1:1"
    check("cannot .* at http://127.0.0.1:1: it refuses the connection: start it", AWS_ENDPOINT_URL=refusing)
    check("host name is not known", AWS_ENDPOINT_URL="http://store.invalid:1")
    check("AWS_ACCESS_KEY_ID is not known there: correct it", AWS_ACCESS_KEY_ID="wrongkeyxyz")
    check("AWS_SECRET_ACCESS_KEY does not belong", AWS_SECRET_ACCESS_KEY="wrong-secret-xyz")
    check("bucket 'no-such-bucket' does not exist: create it", bucket="no-such-bucket")
    check("set AWS_ACCESS_KEY_ID and AWS_SECRET", AWS_ACCESS_KEY_ID="")
    check("TLS|connection broke", AWS_ENDPOINT_URL=s3_server.endpoint.replace("http:", "https:"))
    with_keys = s3_server.endpoint.replace("//", f"//{s3_server.key}:{s3_server.secret}@")
    check("holds credentials", AWS_ENDPOINT_URL=with_keys)
    for wrong in ("localhost:9000", "ftp://x", "http://", "http://x:port", "http://x/path"):
        check("is not an address", AWS_ENDPOINT_URL=wrong)


def test_silent_and_foreign_servers(s3_server, monkeypatch):
    """A server that accepts and says nothing; one that speaks HTTP but not S3."""
    import http.server
    import socket

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        refused(open_store("s3://bucket/x").check, "does not answer in time")

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><br></html>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        refused(open_store("s3://bucket/x").check, "does not answer like S3|answered HTTP 501")
        server.shutdown()


def test_transfers_refuse_quickly_too(s3_server, tmp_path, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = fill(tmp_path / "in")
    missing = open_store("s3://no-such-bucket/x")
    refused(lambda: missing.put(folder, kind="x"), "'no-such-bucket' does not exist")
    refused(lambda: missing.get(f"{missing.uri}/trees/{KEY}"), "'no-such-bucket' does not exist")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(StoreError, match="refuses the connection"):
        open_store("s3://bucket/x").put(folder, kind="x")
    assert time.monotonic() - start < 10


def test_a_broken_download_goes_on(s3_server, tmp_path, monkeypatch):
    from urllib3.exceptions import ProtocolError

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    tree = store.put(fill(tmp_path / "in"), kind="x")
    offsets, real = [], store._back._open
    large = blob_of(store, tree, "a/b/c/weights.bin")

    @contextlib.contextmanager
    def breaking(key, offset=0):
        with real(key, offset) as response:
            stream = response.stream

            def one_piece(size):
                yield next(stream(size))
                raise ProtocolError("Connection broken")

            if key == large:
                offsets.append(offset)
                if len(offsets) < 3:
                    response.stream = one_piece
            yield response

    store._back._open = breaking
    assert contents(store.get(tree)) == FILES
    assert offsets == [0, 1 << 20, 2 << 20]


def test_answers_of_other_servers():
    from trimtab.store.s3_errors import explain_code

    full = explain_code("XMinioStorageFull", "Storage backend has reached …", "write x", "http://s", "b")
    assert isinstance(full, StoreError) and "no space left" in str(full)
    assert isinstance(explain_code("HTTP 503", "", "write x", "http://s", "b"), StoreError)
    denied = explain_code("AccessDenied", "", "write x", "http://s", "bucket-1")
    assert isinstance(denied, InputError) and "'bucket-1'" in str(denied)


def test_a_server_without_conditional_writes_is_refused(s3_server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    request = store._back._http.request
    monkeypatch.setattr(store._back._http, "request", lambda *a, headers, **k: request(*a, **k))
    with pytest.raises(InputError, match="ignores If-None-Match"):
        store.release("a", {})
    assert store.releases("a") == []


def test_logs_hold_no_credential(s3_server, monkeypatch, caplog):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    store._back._atomic_create = True
    monkeypatch.setattr(store._back, "names", lambda _: [])
    store._back._client._base_url = type(store._back._client._base_url)("http://127.0.0.1:1", "us-east-1")
    with caplog.at_level("INFO"), pytest.raises(StoreError, match="refuses the connection") as caught:
        store.release("a", {})
    for text in (caplog.text, str(caught.value)):
        assert s3_server.key not in text and s3_server.secret not in text and "Signature" not in text
