"""The store's back end in a local (or mounted) folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.base.errors import InputError, StoreError
from trimtab.store import clock
from trimtab.store.transfer import Meter, changed, chunks, cloned, explained, pump, settle
from trimtab.store.tree import Entry

#: A smaller file is hashed before it is copied: its second reading comes from memory.
LARGE = 64 << 20

#: Names of the temporary files that this process is writing.
_live: set[str] = set()


class LocalBack:
    """Objects as files below `root`, each written to `.partial/` and renamed when it is complete."""

    def __init__(self, root: Path):
        self.root = root
        self.uri = root.as_uri()
        self._sizes: set[int] | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Makes the folder ready for writing and removes what dead processes of this host left behind."""
        with explained(f"the store {self.root}"):
            partial = self.root / ".partial"
            partial.mkdir(parents=True, exist_ok=True)
            for path in partial.iterdir():
                if _is_abandoned(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yields an empty folder on the store's own file system: what is made there and given away is linked."""
        self.prepare()
        name = _new_name()
        path = self.root / ".partial" / name
        with explained(f"the store {self.root}"):
            path.mkdir(mode=0o700)
            lock = os.open(path, os.O_RDONLY)
        _live.add(name)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(lock)
            shutil.rmtree(path, ignore_errors=True)
            _live.discard(name)

    def size(self, key: str) -> int | None:
        """Returns an object's bytes, None when it is absent."""
        return self._unless_absent(key, lambda path: path.stat().st_size, None)

    def read(self, key: str) -> bytes | None:
        """Returns a small object's content, None when it is absent."""
        return self._unless_absent(key, Path.read_bytes, None)

    def names(self, folder: str) -> list[str]:
        """Returns the names of the objects in a folder, sorted."""
        return self._unless_absent(folder, lambda path: sorted(os.listdir(path)), [])

    def modified(self, key: str) -> float | None:
        """Returns when an object was written, in seconds since 1970, None when it is absent."""
        return self._unless_absent(key, lambda path: path.stat().st_mtime, None)

    def entries(self, folder: str) -> list[Entry]:
        """Lists all objects below a folder, in any order."""
        found = []
        with explained(f"{folder} in {self.uri}"):
            for path in (self.root / folder).rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # a lease may end meanwhile
                    if path.is_file():
                        about = path.stat()
                        key, identity = path.relative_to(self.root).as_posix(), (about.st_dev, about.st_ino)
                        on_disk = 512 * about.st_blocks
                        found.append(Entry(key, about.st_size, about.st_mtime, on_disk, about.st_nlink, identity))
        return found

    def lock(self, exclusive: bool) -> contextlib.AbstractContextManager | None:
        """Returns the store's lock, held until it is closed or its process ends; None where another has it.

        Where the file system has no locks, rights end by the clock alone.
        """
        with explained(f"the store {self.root}"):
            file = open(self.root / ".lock", "a+b")  # noqa: SIM115, the caller closes it
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass
        return file

    def remove(self, key: str, before: float | None = None) -> None:
        """Removes an object, if it is there; not at or after `before`, seconds since 1970, which is `Late`."""
        clock.check(before, f"remove {key}")
        with explained(f"{key} in {self.uri}"):
            (self.root / key).unlink(missing_ok=True)

    def write(self, key: str, data: bytes, before: float | None = None) -> None:
        """Writes a small object atomically; replaces an earlier one. `before` as in `remove`."""
        with explained(f"{key} in {self.uri}"), self._partial() as (path, file):
            file.write(data)
            settle(file)
            clock.check(before, f"write {key}")
            os.replace(path, self._place(key))

    def create(self, key: str, data: bytes, before: float | None = None) -> bool:
        """Writes a small object unless there is one already; returns whether it wrote. Atomic. `before` as in `remove`.
        """
        clock.check(before, f"create {key}")
        with explained(f"{key} in {self.uri}"), self._partial() as (path, file):
            file.write(data)
            settle(file)
            target = self._place(key)
            try:
                os.link(path, target)
            except FileExistsError:
                return False
            except OSError:
                # No hard links here (SMB, some FUSE file systems): claim the name, then fill it.
                try:
                    target.open("xb").close()
                except FileExistsError:
                    return False
                os.replace(path, target)
            return True

    def add(self, source: Path, size: int, meter: Meter, move: bool) -> str:
        """Brings a file into blobs/ and returns its SHA-256. With `move`, a hard link suffices; without, a clone where
        the file system can make one.

        A large file is read once: hashed while it is copied if no blob has its size, so that it cannot be
        there yet; otherwise hashed first, and copied only if it is missing.
        """
        with explained(str(source)):
            linked = move and not source.is_symlink() and source.stat().st_nlink == 1
            open(source, "rb").close()
        with explained(f"the store {self.uri}, for {source},"):
            expected = None
            if linked or size < LARGE or size in self._known_sizes():
                expected, count = pump(chunks(source), None, meter.touch)
                if count != size:
                    raise changed(source)
                if self.size(blob_key(expected)) == size:
                    meter.advance(size)
                    return expected
            if not (linked and expected and self._link(source, expected)):
                expected = self._copy(source, size, meter, expected)
            else:
                meter.advance(size)
            if self._sizes is not None:
                self._sizes.add(size)
            return expected

    def fetch(self, key: str, size: int, target: Path, meter: Meter) -> str | None:
        """Brings a blob to `target`, which must not exist, and returns its SHA-256; None when it is absent.

        On the same file system `target` is a hard link, which costs no second copy.
        """
        blob = self.root / key
        try:
            os.link(blob, target)
            return pump(chunks(target), None, meter.advance)[0]
        except FileNotFoundError:
            return None
        except OSError:
            # Another file system, too many links, or links to another user's files are forbidden.
            with open(target, "xb") as file:
                checksum, _ = pump(chunks(blob), file.write, meter.advance)
                settle(file)
            return checksum

    def checksum(self, key: str, size: int, meter: Meter) -> str | None:
        """Returns the SHA-256 of a blob's content, None when it is absent."""
        return self._unless_absent(key, lambda path: pump(chunks(path), None, meter.advance)[0], None)

    def check(self) -> None:
        """See `Store.check`."""
        try:
            with explained(f"the store {self.root}"):
                if self.root.exists() and not self.root.is_dir():
                    raise InputError(f"the store {self.root} is not a folder: choose another path")
            self.prepare()
            with explained(f"the store {self.root}"), self._partial() as (_, file):
                file.write(b"trimtab")
                settle(file)
        except StoreError as error:
            raise InputError(f"the store cannot be written: {error}") from None

    def _unless_absent(self, key: str, read: Callable[[Path], Any], absent: Any) -> Any:
        with explained(f"{key} in {self.uri}"):
            try:
                return read(self.root / key)
            except FileNotFoundError:
                return absent

    def _place(self, key: str) -> Path:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _copy(self, source: Path, size: int, meter: Meter, expected: str | None) -> str:
        with self._partial() as (path, file):
            if cloned(source, file):
                checksum, count = pump(chunks(path), None, meter.advance)
            else:
                checksum, count = pump(chunks(source), file.write, meter.advance)
            if count != size or (expected and checksum != expected):
                raise changed(source)
            settle(file)
            os.fchmod(file.fileno(), 0o444)
            os.replace(path, self._place(blob_key(checksum)))
            return checksum

    def _link(self, source: Path, checksum: str) -> bool:
        """Makes a blob of the file itself. The source stays until the tree is complete: a put that dies loses
        nothing."""
        with self._partial() as (path, _):
            path.unlink()
            try:
                os.link(source, path)
            except OSError:
                return False
            with open(path, "rb") as file:
                settle(file)
                os.fchmod(file.fileno(), 0o444)
            os.replace(path, self._place(blob_key(checksum)))
            return True

    def _known_sizes(self) -> set[int]:
        with self._lock:
            if self._sizes is None:
                self._sizes = set()
                for folder in self.names("blobs"):
                    with os.scandir(self.root / "blobs" / folder) as entries:
                        self._sizes.update(entry.stat().st_size for entry in entries)
            return self._sizes

    @contextlib.contextmanager
    def _partial(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Yields a new temporary file, locked while it is written; it is gone afterwards unless renamed."""
        name = _new_name()
        path = self.root / ".partial" / name
        _live.add(name)
        try:
            with open(path, "xb") as file:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path, file
        finally:
            path.unlink(missing_ok=True)
            _live.discard(name)


def _new_name() -> str:
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(6)}"


def blob_key(checksum: str) -> str:
    """Returns the key of the blob with this SHA-256."""
    return f"blobs/{checksum[:2]}/{checksum}"


def _is_abandoned(path: Path) -> bool:
    """Tells whether a temporary file, or a folder, belongs to a dead process of this host.

    Two containers can share a host name and count their processes apart (host network), and a restarted
    container has its old name and process number; so the number must be dead or our own, and the lock free.
    """
    host, _, rest = path.name.rpartition(".")[0].rpartition(".")
    if host != socket.gethostname() or not rest.isdigit() or path.name in _live:
        return False
    if int(rest) != os.getpid():
        try:
            os.kill(int(rest), 0)
            return False
        except ProcessLookupError:
            pass
        except PermissionError:
            return False
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        os.close(opened)
    return True
