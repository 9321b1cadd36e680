"""Moving bytes: hashed while they are read, counted, in parallel, and all stopped when one fails."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.base.errors import InputError, StoreError

CHUNK = 1 << 20
WORKERS = 8
#: _IOW(0x94, 9, int) of linux/fs.h.
_FICLONE = 0x40049409

Progress = Callable[[int, int], None]


class Stopped(Exception):
    """Another transfer of the same tree has failed; this one ends too. Never leaves `in_parallel`."""


class Meter:
    """Counts the bytes of parallel transfers, and tells `progress` (bytes done, bytes in total).

    `beat` is called again and again meanwhile, from several threads: it keeps up what must not end before they do.
    """

    def __init__(self, total: int, progress: Progress | None = None, beat: Callable[[], None] = lambda: None):
        self._done, self._total, self._progress, self._beat = 0, total, progress, beat
        self._lock = threading.Lock()
        self._stopped = False

    def advance(self, count: int) -> None:
        """Adds `count` bytes. Raises Stopped after `stop`."""
        if self._stopped:
            raise Stopped
        self._beat()
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)

    def touch(self, _count: int = 0) -> None:
        """Like `advance` for bytes that are read only to learn their checksum: counts nothing."""
        if self._stopped:
            raise Stopped
        self._beat()

    def stop(self) -> None:
        self._stopped = True


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any], meter: Meter) -> list[Any]:
    """Returns [work(item) for item in items], 8 at a time; the first failure stops the rest and is raised."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in done if future.exception()), None)
            return [future.result() for future in ([failed] if failed else futures)]
        except BaseException:
            meter.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def chunks(path: Path) -> Iterator[memoryview]:
    """Yields the content of a file in pieces; each piece is valid until the next one is asked for."""
    view = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            yield view[:count]


def read_whole(path: Path, size: int) -> bytes:
    """Returns the content of a file that has so many bytes.

    Raises:
        StoreError: it has another size, or was edited meanwhile.
    """
    with open(path, "rb") as file:
        before = os.fstat(file.fileno()).st_mtime_ns
        data = file.read(size + 1)
        if len(data) != size or os.fstat(file.fileno()).st_mtime_ns != before:
            raise changed(path)
    return data


def pump(
    pieces: Iterable[Any], write: Callable[[Any], Any] | None, advance: Callable[[int], None]
) -> tuple[str, int]:
    """Passes pieces to `write` (if given) and `advance`; returns the SHA-256 and the bytes of all of them."""
    checksum, size = hashlib.sha256(), 0
    for piece in pieces:
        checksum.update(piece)
        if write:
            write(piece)
        size += len(piece)
        advance(len(piece))
    return checksum.hexdigest(), size


class CheckedFile:
    """A file that is sent: hashed again on the way, and refused at its last byte if it has changed."""

    def __init__(self, file: BinaryIO, source: Path, size: int, checksum: str, meter: Meter):
        self._file, self._source, self._meter = file, source, meter
        self._left, self._expected, self.sent = size, checksum, 0
        self._checksum = hashlib.sha256()

    def read(self, count: int) -> bytes:
        piece = self._file.read(count)
        self._checksum.update(piece)
        self._left -= len(piece)
        self.sent += len(piece)
        if not piece or (not self._left and not self._is_unchanged()):
            raise changed(self._source)
        self._meter.advance(len(piece))
        return piece

    def _is_unchanged(self) -> bool:
        return self._checksum.hexdigest() == self._expected and not self._file.read(1)


def cloned(source: Path, file: BinaryIO) -> bool:
    """Makes an empty file share the blocks of another until either is changed, where the file system can: btrfs, XFS,
    bcachefs, ZFS 2.2; returns whether it did. The clone is what the source is now, whatever becomes of that.

    Not by a hard link: who goes on editing the source would edit what is stored.
    """
    try:
        with open(source, "rb") as original:
            fcntl.ioctl(file.fileno(), _FICLONE, original.fileno())
        return True
    except OSError:
        return False


def settle(file: Any) -> None:
    """Brings what was written to an open file onto the disk, so that a manifest never outlives a blob."""
    file.flush()
    os.fsync(file.fileno())


def changed(source: Path) -> StoreError:
    """The error for a file that is edited while it is put."""
    return StoreError(f"{source} changed while it was read: put the folder when nothing writes to it")


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns an OSError into one sentence about `where`.

    Raises:
        InputError: access is refused, or a part of the path is not a folder.
        StoreError: a full disk, or any other trouble.
    """
    try:
        yield
    except OSError as error:
        text = error.strerror or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            problem = f"no space left at {where} ({text}): free some and run again; nothing partial was kept"
            raise StoreError(problem) from None
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise InputError(f"{where} is not a folder ({error.filename}): choose another one") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            who = f"user {os.geteuid()}"
            raise InputError(f"{where} refuses {who} ({text}): grant it or choose another place") from None
        raise StoreError(f"{where}: {text}") from None
