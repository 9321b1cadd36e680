"""The store's back end in an S3 bucket: AWS, MinIO, SeaweedFS or any other endpoint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trimtab.base.errors import InputError, StoreError, Unreachable
from trimtab.store.local import blob_key
from trimtab.store.s3_requests import Requests, absent
from trimtab.store.transfer import CHUNK, CheckedFile, Meter, changed, chunks, explained, pump, read_whole, settle
from trimtab.store.tree import Entry

#: Bytes of a part of a large upload, and the largest file that is sent in one request. In memory are 8 files at most,
#: each with 3 parts that are sent and 1 that is read, or as a whole: 256 MiB.
PART, PARTS_AT_ONCE, MAX_PARTS = 8 << 20, 3, 10_000
WHOLE = 32 << 20


class S3Back:
    """Objects below a prefix of a bucket. An object becomes visible when its upload is complete.

    An upload that is killed leaves invisible parts on the server: give the bucket a lifecycle rule that
    aborts incomplete multipart uploads.

    Args:
        bucket, prefix: where; the prefix may be empty.
        environment: endpoint and credentials, see `trimtab.store.open_store`.
        read_timeout: seconds without a byte from the server before a request fails.
        retries: how often a request that failed is sent again.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        environment: Mapping[str, str] = os.environ,
        read_timeout: float = 60,
        retries: int = 4,
    ):
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._requests = Requests(bucket, environment, read_timeout, retries)
        self._client, self._insist = self._requests.client, self._requests.insist
        self._atomic_create = False

    def prepare(self) -> None:
        """Nothing to do: S3 has no partial objects."""

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yields an empty folder for what is about to be sent: an object's name is its content's checksum, so that all
        of it must be there first."""
        with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            yield Path(folder)

    def size(self, key: str) -> int | None:
        """Returns an object's bytes, None when it is absent."""
        return self._insist(f"look at {key}", lambda: self._stat(key, "size"))

    def read(self, key: str) -> bytes | None:
        """Returns a small object's content, None when it is absent."""

        def read() -> bytes | None:
            with absent(), self._open(key) as response:
                return response.read()
            return None

        return self._insist(f"read {key}", read)

    def names(self, folder: str) -> list[str]:
        """Returns the names of the objects in a folder, sorted."""
        prefix = f"{self._key(folder)}/".removeprefix("/").replace("//", "/")

        def names() -> list[str]:
            listed = self._client.list_objects(self.bucket, prefix=prefix)
            return sorted(item.object_name.removeprefix(prefix) for item in listed if not item.is_dir)

        return self._insist(f"list {folder}", names)

    def modified(self, key: str) -> float | None:
        """Returns when an object was written, in seconds since 1970, None when it is absent."""
        when = self._insist(f"look at {key}", lambda: self._stat(key, "last_modified"))
        return when and when.timestamp()

    def entries(self, folder: str) -> list[Entry]:
        """Lists all objects below a folder, in any order."""
        prefix, start = f"{self._key(folder)}/", len(self._key(""))

        def entries() -> list[Entry]:
            listed = self._client.list_objects(self.bucket, prefix=prefix, recursive=True)
            return [
                Entry(item.object_name[start:], item.size, item.last_modified.timestamp(), item.size) for item in listed
            ]

        return self._insist(f"list {folder}", entries)

    def lock(self, exclusive: bool) -> contextlib.AbstractContextManager:
        """Nothing: the server itself refuses what comes after its time."""
        return contextlib.nullcontext()

    def remove(self, key: str, before: float | None = None) -> None:
        """Removes an object, if it is there; the server refuses it after `before`, seconds since 1970: `Late`."""
        if before is None:
            self._insist(f"remove {key}", lambda: self._client.remove_object(self.bucket, self._key(key)))
        else:
            self._insist(f"remove {key}", lambda: self._requests.timed("DELETE", key, self._key(key), before))

    def write(self, key: str, data: bytes, before: float | None = None) -> None:
        """Writes a small object atomically; replaces an earlier one. `before` as in `remove`."""
        if before is None:
            self._send(key, data)
        else:
            self._insist(f"write {key}", lambda: self._requests.timed("PUT", key, self._key(key), before, data))

    def create(self, key: str, data: bytes, before: float | None = None) -> bool:
        """Writes a small object unless there is one already; returns whether it wrote. Atomic. `before` as in `remove`.

        Raises:
            InputError: the endpoint ignores If-None-Match, so that two writers could overwrite each other.
        """
        if not self._atomic_create:
            self.write(".check", b"")
            if self._put_if_absent(".check", b""):
                problem = f"{self._requests.endpoint} ignores If-None-Match, which releases need to be numbered safely"
                raise InputError(f"{problem}: update that server or keep releases in another store")
            self._atomic_create = True
        try:
            return self._put_if_absent(key, data, before)
        except Unreachable:  # it may have been written, and only the answer lost
            found = self.read(key)
            return self._put_if_absent(key, data, before) if found is None else found == data

    def add(self, source: Path, size: int, meter: Meter, move: bool) -> str:
        """Brings a file into blobs/ and returns its SHA-256; sends nothing that is there already.

        A file of at most `WHOLE` bytes is read once, and what was hashed is what is sent, in one request; a larger one
        is read again and sent in parts.
        """
        with explained(str(source)):
            data = read_whole(source, size) if size <= WHOLE else None
            if data is not None:
                checksum = hashlib.sha256(data).hexdigest()
            else:
                checksum, count = pump(chunks(source), None, meter.touch)
                if count != size:
                    raise changed(source)
            key = blob_key(checksum)
            meter.touch()
            if self.size(key) == size:
                meter.advance(size)
            elif data is not None:
                self._send(key, data, meter)
                meter.advance(size)
            else:
                self._send_parts(key, source, size, checksum, meter)
            return checksum

    def fetch(self, key: str, size: int, target: Path, meter: Meter) -> str | None:
        """Brings a blob to `target`, which must not exist, and returns its SHA-256; None when it is absent."""
        with open(target, "xb") as file:
            checksum = self._stream(key, size, file.write, meter)
            settle(file)
            return checksum

    def checksum(self, key: str, size: int, meter: Meter) -> str | None:
        """Returns the SHA-256 of a blob's content, None when it is absent."""
        return self._stream(key, size, None, meter)

    def download(self, folder: Path, suffixes: tuple[str, ...], without: Sequence[str] = ()) -> None:
        """Brings what lies directly below the prefix into a folder: a model that somebody else put there.

        Args:
            suffixes: of the names that are brought.
            without: patterns of names that are not.
        """
        for name in self.names(""):
            if name.endswith(suffixes) and not any(fnmatchcase(name, pattern) for pattern in without):
                get = self._client.fget_object
                self._insist(f"download {name}", lambda: get(self.bucket, self._key(name), str(folder / name)))  # noqa: B023

    def check(self) -> None:
        """See `Store.check`."""
        probe = S3Back(self.bucket, self.prefix, read_timeout=3, retries=1)
        try:
            # A listing, not a HEAD: only an answer with a body says which credential is wrong.
            with probe._requests.explained("list objects"):
                next(iter(probe._client.list_objects(self.bucket, prefix=probe._key("releases/"))), None)
            probe.write(".check", b"")
            probe.read(".check")
        except StoreError as error:
            raise InputError(str(error)) from None

    def _send(self, key: str, data: bytes, meter: Meter | None = None) -> None:
        """Sends an object in one request."""
        put, part = self._client.put_object, max(PART, len(data))
        self._insist(
            f"write {key}", lambda: put(self.bucket, self._key(key), io.BytesIO(data), len(data), part_size=part), meter
        )

    def _send_parts(self, key: str, source: Path, size: int, checksum: str, meter: Meter) -> None:
        """Sends a large file, several parts at a time."""
        part, sent = max(PART, -(-size // MAX_PARTS)), 0

        def send() -> None:
            nonlocal sent
            if sent:
                meter.advance(-sent)
            with open(source, "rb") as file:
                body = CheckedFile(file, source, size, checksum, meter)
                try:
                    self._client.put_object(
                        self.bucket, self._key(key), body, size, part_size=part, num_parallel_uploads=PARTS_AT_ONCE
                    )
                finally:
                    sent = body.sent

        self._insist(f"write {key}", send, meter)

    @contextlib.contextmanager
    def _open(self, key: str, offset: int = 0) -> Iterator[Any]:
        response = self._client.get_object(self.bucket, self._key(key), offset=offset)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _put_if_absent(self, key: str, data: bytes, before: float | None = None) -> bool:
        return self._requests.put_if_absent(key, self._key(key), data, before)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _stat(self, key: str, what: str) -> Any:
        from minio.error import S3Error

        with absent():
            try:
                return getattr(self._client.stat_object(self.bucket, self._key(key)), what)
            except S3Error as error:
                if error.code == "AccessDenied":  # an answer to HEAD has no body that says why; one to a listing has
                    next(iter(self._client.list_objects(self.bucket, prefix=self._key(key))), None)
                raise
        return None

    def _stream(self, key: str, size: int, write: Callable[[bytes], Any] | None, meter: Meter) -> str | None:
        """Passes a blob's content to `write` (if given) and returns its SHA-256; None when it is absent.

        A download that breaks off goes on where it stopped.
        """
        from urllib3.exceptions import ProtocolError

        checksum, done = hashlib.sha256(), 0

        def rest() -> bool:
            nonlocal done
            with absent():
                try:
                    with self._open(key, done) as response:
                        for piece in response.stream(CHUNK):
                            if write:
                                write(piece)
                            checksum.update(piece)
                            done += len(piece)
                            meter.advance(len(piece))
                            self._requests.heard()
                except ProtocolError:
                    if done < size:
                        raise
                return True
            return False

        return checksum.hexdigest() if self._insist(f"read {key}", rest, meter) else None
