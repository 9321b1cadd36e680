"""The store: one copy on one file system, and nothing of a user's linked into it."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from trees import FILES, blob_of, contents, fill, is_clean

from trimtab.base.errors import StoreError
from trimtab.components.fetch import source
from trimtab.store import Store, cache, open_store, transfer
from trimtab.store.local import LocalBack


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system that clones files, as btrfs and XFS do: here it copies, and says how often it was asked."""
    asked: list[int] = []

    def ioctl(target: int, request: int, original: int) -> None:
        assert request == 0x40049409, "FICLONE of linux/fs.h"
        os.sendfile(target, original, 0, os.fstat(original).st_size)
        asked.append(original)

    monkeypatch.setattr(transfer.fcntl, "ioctl", ioctl)
    return asked


def test_what_is_put_is_cloned_where_that_is_possible(store, tmp_path, clones):
    tree = store.put(fill(tmp_path / "in"), kind="checkpoint")
    assert len(clones) == len(FILES) and contents(store.get(tree)) == FILES and is_clean(tmp_path)
    assert store.put(tmp_path / "in", kind="checkpoint") == tree and len(clones) == len(FILES)


def test_a_file_that_grew_since_it_was_listed_is_refused_when_it_is_cloned(tmp_path, clones):
    back = LocalBack(tmp_path / "store")
    back.prepare()
    path = fill(tmp_path / "in", {"a": b"12345"}) / "a"
    with pytest.raises(StoreError, match="changed while it was read"):
        back._copy(path, 4, transfer.Meter(4), None)


def test_a_users_file_is_never_linked(store, tmp_path):
    """Who edits it in place would edit the store, and who stores it would take away the right to write it."""
    folder = fill(tmp_path / "in")
    tree = store.put(folder, kind="checkpoint")
    with (folder / "config.json").open("r+b") as file:
        file.write(b"[]")
    assert (folder / "config.json").stat().st_nlink == 1
    assert contents(store.get(tree)) == FILES


def test_what_is_made_in_a_workspace_is_stored_and_cached_without_a_copy(store, tmp_path):
    with store.workspace() as folder:
        inode = (fill(folder) / "config.json").stat().st_ino
        tree = store.put(folder, kind="checkpoint", move=True)
    assert not folder.exists() and is_clean(tmp_path)
    blob = tmp_path / "store" / blob_of(store, tree, "config.json")
    assert {blob.stat().st_ino, (store.get(tree) / "config.json").stat().st_ino} == {inode}


def test_a_workspace_goes_with_its_process_alone(store, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with store.workspace() as alive:
        fill(alive)
        host = alive.name.split(".")[0]
        left, held = (alive.parent / f"{host}.{dead.pid}.0{number}" for number in range(2))
        fill(left)
        fill(held)
        locked = os.open(held, os.O_RDONLY)
        fcntl.flock(locked, fcntl.LOCK_EX)
        open_store(str(tmp_path / "store")).put_json("x", {})
        os.close(locked)
        assert (alive.exists(), left.exists(), held.exists()) == (True, False, True)


def test_a_download_is_linked_into_the_store(store, tmp_path, write_model, monkeypatch):
    model, inodes = write_model(tmp_path / "model"), {}

    def download(_: str, folder: Path) -> None:
        for path in model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
            inodes[path.name] = (folder / path.name).stat().st_ino

    monkeypatch.setattr(source, "_download_from_s3", download)
    monkeypatch.setattr(source, "_named_by_artifact", lambda *_: None)
    tree = source.fetch("s3://bucket/model", store)
    cached = store.get(tree)
    assert {name: (cached / name).stat().st_ino for name in store.manifest(tree).files} == {
        name: inodes[name] for name in store.manifest(tree).files
    }


@pytest.mark.parametrize(
    ("devices", "mounted", "told", "there"),
    [
        ((1, 2), "ext4", "", True),
        ((1, 1), "ext4", "", False),
        ((1, 2), "nfs4", "", False),
        ((1, 2), "ext4", "/somewhere", False),
    ],
)
def test_the_cache_of_a_store_on_another_disk_is_beside_it(devices, mounted, told, there, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", told)
    store = tmp_path / "store"
    monkeypatch.setattr(cache, "_device", lambda folder: devices[folder == store])
    monkeypatch.setattr(cache, "_is_remote", lambda folder: mounted.startswith(cache._REMOTE))
    assert cache.beside(store) == (store / ".cache" if there else None)
