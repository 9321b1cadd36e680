"""The cache of a node: each tree is brought in once, verified, and then shared by all processes.

What no running process uses goes: after `AGE` without use, and the longest unused first where the trees take more than
TRIMTAB_CACHE_GB (half of the file system that the cache is on). It is looked at whenever a tree is brought in. A file
that has a name in a local store too takes nothing here, and counts as nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import BinaryIO

from trimtab.base import progress as told
from trimtab.base.errors import Damaged, InputError
from trimtab.base.transient import POD
from trimtab.store.local import blob_key
from trimtab.store.transfer import Meter, Progress, chunks, explained, in_parallel, pump
from trimtab.store.tree import Manifest

#: The lock under which trees are removed, and under which a process says that it uses one.
EVICTION = "eviction"
#: Where it is.
FOLDER = "TRIMTAB_CACHE"
#: What nobody used for so long is removed.
AGE = timedelta(days=14)
#: Beginnings of the names that Linux gives to file systems of other machines.
_REMOTE = ("nfs", "cifs", "smb", "ceph", "lustre", "glusterfs", "9p", "fuse", "virtiofs")
#: The most that the trees may take, in units of 1e9 bytes.
SIZE = "TRIMTAB_CACHE_GB"

#: The file that says what this process uses, by cache: locked as long as the process lives.
_users: dict[Path, BinaryIO] = {}


def cache_folder() -> Path:
    """Returns $TRIMTAB_CACHE, by default ~/.cache/trimtab.

    In a pod, a volume that cannot be written, as one is that belongs to root alone, gives way to a folder of the pod's
    own: there is nobody to change the mount while the run waits.
    """
    named = Path(os.environ.get(FOLDER) or "~/.cache/trimtab").expanduser().absolute()
    return _writable(named) if POD in os.environ else named


def beside(store: Path) -> Path | None:
    """Returns where the cache of a local store takes no space: on its own file system, where the usual one is on
    another. None where it is the same; where TRIMTAB_CACHE says; and of a store on a network, which a node reads once.
    """
    usual = Path("~/.cache/trimtab").expanduser().absolute()
    if os.environ.get(FOLDER) or _device(usual) == _device(store) or _is_remote(store):
        return None
    return store / ".cache"


def _device(folder: Path) -> int:
    return next(there for there in (folder, *folder.parents) if there.exists()).stat().st_dev


def _is_remote(folder: Path) -> bool:
    """Whether a folder is on a file system of another machine, as Linux says; a FUSE is taken for one."""
    kinds = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            place, kind = line.split()[1:3]
            kinds[place] = kind
    mounted = next((str(there) for there in (folder, *folder.parents) if str(there) in kinds), "")
    return kinds.get(mounted, "").startswith(_REMOTE)


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
        try:
            if _use(root, digest):
                return target
        except PermissionError:  # a cache that may only be read, which nobody evicts from
            if target.is_dir():
                return target
            raise
    contents = manifest()
    with explained(where), _lock(root / "locks" / digest):
        if _use(root, digest):
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
        _tidy(root)
    return target


@contextmanager
def scratch(key: str, waiting: Callable[[], None]) -> Iterator[Path]:
    """Yields the folder in which work with this key leaves what it has finished, whose only user the body is.

    Two runs of one node may want the same at a time: the second waits, and finds what the first has made, or nothing.

    Args:
        waiting: called before the end of another's work is waited for.
    """
    root = cache_folder()
    with contextlib.ExitStack() as held:
        with contextlib.suppress(PermissionError):  # a cache that may only be read, where not all work needs a scratch
            held.enter_context(_lock(root / "locks" / f"scratch-{key}", waiting))
        yield root / "scratch" / key


def evict(digest: str) -> bool:
    """Removes a tree from the cache of this node unless a running process uses it; returns whether it is gone."""
    root = cache_folder()
    with explained(f"the cache {root} (TRIMTAB_CACHE)"):
        if not (root / "trees" / digest).is_dir():
            return True
        with _lock(root / "locks" / EVICTION):
            return digest not in _in_use(root) and _remove(root, digest)


def links(digests: Collection[str]) -> Counter[tuple[int, int]]:
    """Returns how many names the files of those of these trees that `evict` would remove have in the cache, by device
    and inode."""
    root, found = cache_folder(), Counter()
    used = _in_use(root) if (root / "trees").is_dir() else set()
    for digest in set(digests) - used:
        for path in (root / "trees" / digest).rglob("*"):
            about = path.lstat()
            found[about.st_dev, about.st_ino] += 1
    return found


def _use(root: Path, digest: str) -> bool:
    """Tells whether a tree is there, after saying that this process uses it: while it lives, nothing removes the tree.

    What is not there yet is said to be used all the same, for it is about to be brought.
    """
    with _lock(root / "locks" / EVICTION):
        user = _users.get(root)
        if user is None or not Path(user.name).exists():
            (root / "users").mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(6)}"
            user = _users[root] = open(root / "users" / name, "ab")  # noqa: SIM115, it is closed with the process
            fcntl.flock(user, fcntl.LOCK_EX)
        user.write(f"{digest}\n".encode())
        user.flush()
        target = root / "trees" / digest
        with contextlib.suppress(OSError):  # of another user, or not there
            os.utime(target)
        return target.is_dir()


def _in_use(root: Path) -> set[str]:
    """Returns the digests that processes use; forgets those of processes that have ended."""
    used: set[str] = set()
    for path in (root / "users").glob("*"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            own = _users.get(root)
            if own is None or Path(own.name) != path:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    continue
                except BlockingIOError:
                    pass
            used |= set(file.read().decode().split())
    return used


def _tidy(root: Path) -> None:
    """Removes what nobody used for long, and the longest unused while the rest is too large."""
    most = _most(root)
    with _lock(root / "locks" / EVICTION):
        used, left = _in_use(root), []
        for path in (root / "trees").iterdir():
            age = time.time() - path.stat().st_mtime
            if path.name in used or age < AGE.total_seconds() or not _remove(root, path.name):
                left.append((age, path))
        total = {path: _own_bytes(path) for _, path in left}
        for _, path in sorted(left, reverse=True):
            if sum(total.values()) <= most:
                break
            if path.name not in used and _remove(root, path.name):
                del total[path]
    for folder in (root / "scratch").glob("*"):
        newest = max((path.lstat().st_mtime for path in [folder, *folder.rglob("*")]), default=0.0)
        if time.time() - newest > AGE.total_seconds():
            shutil.rmtree(folder, ignore_errors=True)


def _most(root: Path) -> float:
    text = os.environ.get(SIZE, "")
    if not text:
        about = os.statvfs(root)
        return about.f_blocks * about.f_frsize / 2
    try:
        most = float(text) * 1e9
    except ValueError:
        most = -1.0
    if not most >= 0:
        raise InputError(f"{SIZE}: '{text}' is not valid; write a number of gigabytes, such as 200")
    return most


def _own_bytes(folder: Path) -> int:
    """The bytes on disk of files that have no other name."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum(512 * about.st_blocks for about in found if about.st_nlink == 1)


def _remove(root: Path, digest: str) -> bool:
    """Removes a tree at once for all who look for it, then its files."""
    source, gone = root / "trees" / digest, root / ".partial" / f"{digest}.{secrets.token_hex(6)}"
    gone.parent.mkdir(exist_ok=True)
    try:
        source.chmod(0o755)  # a folder that cannot be written cannot be moved either
        source.rename(gone)
    except OSError:  # of another user
        return False
    _set_folders(gone, 0o755)
    shutil.rmtree(gone, ignore_errors=True)
    return True


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
def _lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock among processes and threads; the kernel releases it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
