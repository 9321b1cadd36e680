"""What a stage has finished, kept in the store while it works, so that it goes on on another node.

A stage leaves what it has finished in its scratch: a shard, a block, a checkpoint of training. Where it was killed, it
is found there. A pod's node may be gone, so in a pod these files are also put into the store, every quarter of an hour
while there is something new, and a stage whose scratch is empty begins with what was put last. That takes at most a
fifth of the time, for a pause is four times as long as the put before it; content that was sent is not sent again.

A file or a folder in a scratch is whole, for it is written beside and renamed: what ends in `.partial` is not finished,
and what was named at one moment belongs together.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trimtab.base import progress
from trimtab.base.errors import Damaged, TrimtabError
from trimtab.base.schema import digest
from trimtab.base.transient import POD
from trimtab.store import Store

#: Seconds between two looks at what is finished.
INTERVAL = 900.0
#: The least pause, in units of the time that the last put took.
PAUSE_OVER_PUT = 4
#: Endings of files and folders that are being written, or that nobody goes on from.
UNFINISHED = (".partial", ".log")
KIND = "checkpoint_of_stage"


class _Ended(Exception):
    """The work is over, so nobody will go on from what is being put."""


@contextlib.contextmanager
def kept(store: Store, stage: str, key: str, scratch: Path) -> Iterator[None]:
    """Keeps what the body finishes in a scratch in the store, and begins with what another node had finished.

    Does nothing outside a pod. Trouble of the store while the body works is reported, and the body goes on.
    """
    if POD not in os.environ:
        yield
        return
    _restore(store, stage, key, scratch)
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(store, stage, key, scratch, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def forget(store: Store, key: str) -> None:
    """Forgets what was kept of a stage whose result is there; its content goes with the next collection."""
    if POD in os.environ:
        with contextlib.suppress(TrimtabError):  # the result is there all the same
            store.forget(_key(key))


def _key(key: str) -> str:
    return digest(["checkpoint", key])


def _restore(store: Store, stage: str, key: str, scratch: Path) -> None:
    if scratch.is_dir() and any(scratch.iterdir()):
        return
    found = store.lookup(_key(key))
    if not found:
        return
    try:
        folder = store.get(found["tree"]["uri"])
    except Damaged as error:
        progress.report(stage, f"begins anew, for what was finished cannot be read: {error}")
        return
    # Copies, for a stage may write into its files, and the cache's belong to everyone.
    shutil.copytree(folder, scratch, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in (scratch, *scratch.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    progress.report(stage, "goes on from what another node had finished")


def _keep(store: Store, stage: str, key: str, scratch: Path, ended: threading.Event) -> None:
    pause, last = INTERVAL, ""
    while not ended.wait(pause):
        started = time.monotonic()
        try:
            last = _put(store, key, scratch, ended, last)
        except _Ended:
            return
        except (TrimtabError, OSError) as error:
            progress.report(stage, f"what is finished stays on this node for now: {error}")
        pause = max(INTERVAL, PAUSE_OVER_PUT * (time.monotonic() - started))


def _put(store: Store, key: str, scratch: Path, ended: threading.Event, last: str) -> str:
    """Puts what is finished, and returns the digest of its tree; `last` is that of the tree before."""

    def go_on(done: int, total: int) -> None:
        if ended.is_set():
            raise _Ended

    with _snapshot(scratch) as files:
        if not files:
            return last
        tree = store.put(files, kind=KIND, metadata={"key": key}, progress=go_on)
    if tree.digest != last and not ended.is_set():
        store.record(_key(key), {"tree": tree.model_dump()})
    return tree.digest


@contextlib.contextmanager
def _snapshot(scratch: Path) -> Iterator[dict[str, Path]]:
    """The finished files of one moment by their names: second names of them, which stay when the first are replaced."""
    with tempfile.TemporaryDirectory(prefix="snapshot-", dir=scratch.parent if scratch.is_dir() else None) as folder:
        while True:
            linked, files = Path(tempfile.mkdtemp(dir=folder)), {}
            try:
                found = {path.relative_to(scratch).as_posix(): path for path in scratch.rglob("*") if path.is_file()}
                files = {name: path for name, path in found.items() if not _is_unfinished(name)}
                for name, path in files.items():
                    (linked / name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(path, linked / name)
            except FileNotFoundError:  # one was replaced or removed meanwhile
                continue
            except OSError:  # a volume without second names
                yield files
                return
            yield {name: linked / name for name in files}
            return


def _is_unfinished(name: str) -> bool:
    return any(part.endswith(UNFINISHED) for part in name.split("/"))
