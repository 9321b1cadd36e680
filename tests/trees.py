"""Trees to store, and what a store then holds, for the tests of the store."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from trimtab.store import Tree
from trimtab.store.local import blob_key

FILES = {"config.json": b"{}", "empty": b"", "a/b/c/weights.bin": random.Random(7).randbytes(3 << 20)}
KEY = "ab" * 32


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
        files = [p for p in back.root.rglob("*") if p.is_file() and p.name != ".lock"]
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
