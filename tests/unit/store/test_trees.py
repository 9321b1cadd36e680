"""The store: trees put and got, also where a process is killed, a file damaged or a name strange."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import time
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import FILES, blob_of, child, contents, delete, fill, is_clean, is_local, objects

from trimtab.base.errors import InputError, StoreError
from trimtab.base.schema import digest
from trimtab.store import open_store


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
