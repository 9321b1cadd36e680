"""The cache of a node: each tree is brought in once, verified, and then shared by all processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from trimtab.base import progress as told
from trimtab.base.errors import Damaged
from trimtab.base.transient import POD
from trimtab.store.local import blob_key
from trimtab.store.transfer import Meter, Progress, chunks, explained, in_parallel, pump
from trimtab.store.tree import Manifest


def cache_folder() -> Path:
    """Returns $TRIMTAB_CACHE, by default ~/.cache/trimtab.

    In a pod, a volume that cannot be written, as one is that belongs to root alone, gives way to a folder of the pod's
    own: there is nobody to change the mount while the run waits.
    """
    named = Path(os.environ.get("TRIMTAB_CACHE") or "~/.cache/trimtab").expanduser().absolute()
    return _writable(named) if POD in os.environ else named


@cache
def _writable(named: Path) -> Path:
    try:
        named.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=named):
            return named
    except OSError as error:
        own = Path(tempfile.gettempdir()) / "trimtab-cache"
        told.report(
            "cache",
            f"{named} cannot be written by user {os.getuid()}, group {os.getgid()} ({error.strerror}): {own} stands in "
            f"for it and ends with this pod; let group 0 write to the volume",
        )
        return own


def bring(
    back, uri: str, digest: str, manifest: Callable[[], Manifest], progress: Progress | None = None
) -> Path:
    """Returns the read-only folder of a tree in the cache, after fetching it if it is not there.

    The folder appears by a rename when every file has its checksum. A fetch that is killed leaves its files
    in `.partial/<digest>`; the next one keeps those whose checksum is right.

    Args:
        back: the back end that holds the blobs.
        uri: the tree's URI, for messages.
        manifest: reads the manifest; called only when the tree is not in the cache.

    Raises:
        Damaged: a file is missing or corrupted in the store; the message names it.
        StoreError: the store could not be read, or the disk is full.
        InputError: the cache folder cannot be written.
    """
    root = cache_folder()
    target = root / "trees" / digest
    where = f"the cache {root} (TRIMTAB_CACHE)"
    with explained(where):
        if target.is_dir():
            return target
    contents = manifest()
    with explained(where), _lock(root / "locks" / digest):
        if target.is_dir():
            return target
        staging = root / ".partial" / digest
        try:
            _fill(staging, back, uri, contents, progress)
            target.parent.mkdir(exist_ok=True)
            staging.rename(target)
            target.chmod(0o555)
        except BaseException:
            _set_folders(staging, 0o755)
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return target


def _fill(staging: Path, back, uri: str, contents: Manifest, progress: Progress | None) -> None:
    meter = Meter(contents.size, progress)

    def fetch(path: str) -> None:
        blob, target = contents.files[path], staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and target.stat().st_size == blob.bytes:
            found, _ = pump(chunks(target), None, meter.touch)
            if found == blob.sha256:
                meter.advance(blob.bytes)
                return
        # Never overwritten in place: it may be a hard link to a blob.
        target.unlink(missing_ok=True)
        key = blob_key(blob.sha256)
        found = back.fetch(key, blob.bytes, target, meter)
        if found != blob.sha256:
            state = "missing" if found is None else "corrupted"
            remedy = f"delete {back.uri}/{key}, if it is there, and put the tree again"
            raise Damaged(f"the file {path!r} of {uri} is {state} in the store: {remedy}")
        target.chmod(0o444)

    _set_folders(staging, 0o755)
    staging.mkdir(parents=True, exist_ok=True)
    in_parallel(fetch, contents.files, meter)
    _set_folders(staging, 0o555)
    # Its own mode comes last: a folder that cannot be written cannot be moved either.
    staging.chmod(0o755)


def _set_folders(folder: Path, mode: int) -> None:
    """Sets the mode of a folder and all folders below it; nothing if it does not exist."""
    if folder.is_dir():
        folder.chmod(0o755)
        for entry in folder.iterdir():
            _set_folders(entry, mode)
        folder.chmod(mode)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock among processes and threads; the kernel releases it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
