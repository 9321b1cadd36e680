"""The store: trees, the index of results, and releases, in S3 or a folder."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from trimtab.errors import Damaged, InputError
from trimtab.store import leases
from trimtab.store.address import canonical, check_name, folder_of, is_name, split_release, split_tree
from trimtab.store.cache import bring
from trimtab.store.local import LocalBack, blob_key
from trimtab.store.transfer import Meter, Progress, explained, in_parallel
from trimtab.store.tree import Blob, Manifest, Tree, list_files

#: A tree that is put again or looked up is written anew when it is older: see `trimtab.store.garbage`.
RENEW = timedelta(days=1)

_KEY = re.compile(r"[0-9a-f]{64}")


def open_store(address: str) -> Store:
    """Returns the store at `s3://bucket/prefix`, `file:///some/folder` or `/some/folder`; contacts nothing.

    S3's endpoint and credentials come from the environment: AWS_ENDPOINT_URL (http or https; default
    https://s3.amazonaws.com), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION.

    Raises:
        InputError: the address or the endpoint is not valid, or the credentials are not set.
    """
    address = canonical(address)
    if not address.startswith("s3://"):
        return Store(LocalBack(folder_of(address)))
    from trimtab.store.s3 import S3Back

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    return Store(S3Back(bucket, prefix))


class Store:
    """Immutable, content-addressed trees; the results of stages by key; numbered releases.

    Layout: `blobs/<first two digits>/<SHA-256>`, `trees/<digest>.json` (the manifest, written last: what is
    half written is never visible), `index/<key>.json`, `releases/<name>/<version>.json`, `pins/<name>.json`;
    `leases/` and `collecting.json` say who is at work; in a folder also `.partial/` for temporary files. Threads
    and processes may share a store.

    Every method raises StoreError when the store fails (network, disk, a damaged object) and InputError when
    something given is wrong (address, credentials, permissions, arguments).
    """

    def __init__(self, back: Any):
        self._back = back
        self.uri: str = back.uri

    def put(
        self,
        folder: str | Path | Mapping[str, Path],
        *,
        kind: str,
        metadata: Mapping[str, Any] | None = None,
        move: bool = False,
        progress: Progress | None = None,
    ) -> Tree:
        """Stores the files of a folder and returns their tree; sends no content that is there already.

        Args:
            folder: its files, with links to files inside it followed; empty folders and modes are not kept. Or the
                tree's files by name, and where each lies.
            kind: what the tree is ("checkpoint"); part of the digest.
            metadata: JSON; part of the digest.
            move: the files are given away: deleted when the tree is complete, and in a local store on the
                same file system not copied. Nothing may write to them any more.
            progress: called with (bytes done, bytes in total), from several threads, one at a time.

        Raises:
            InputError: `folder` holds what a tree cannot hold (see `list_files`), or metadata is not JSON.
            StoreError: a file changed while it was read, or the store failed; no part of the tree is visible,
                and putting it again sends only what is missing.
        """
        if isinstance(folder, Mapping):
            places = dict(sorted(folder.items()))
            with explained(", ".join(places)):
                sizes = {name: place.stat().st_size for name, place in places.items()}
        else:
            sizes = list_files(folder)
            places = {name: Path(folder) / name for name in sizes}
        metadata = json.loads(_json(metadata or {}, "metadata"))
        self._back.prepare()
        meter = Meter(sum(sizes.values()), progress)
        with leases.working(self._back):
            sums = in_parallel(lambda path: self._back.add(places[path], sizes[path], meter, move), sizes, meter)
            files = {path: Blob(sha256=sha, bytes=sizes[path]) for path, sha in zip(sizes, sums, strict=True)}
            manifest = Manifest.parse({"kind": kind, "metadata": metadata, "files": files})
            key = f"trees/{manifest.digest}.json"
            if _is_old(self._back.modified(key)):
                self._back.write(key, _json(manifest.document, "the manifest"))
        if move:
            for place in places.values():
                with explained(str(place)):
                    place.unlink()
        return Tree(uri=f"{self.uri}/trees/{manifest.digest}", digest=manifest.digest, bytes=manifest.size)

    def put_json(self, kind: str, document: Any, **others: Any) -> Tree:
        """Stores a JSON document as a tree with one file, `<kind>.json`, and others beside it by their names."""
        with tempfile.TemporaryDirectory(prefix=f"trimtab-{kind}-") as folder:
            for name, content in {kind: document, **others}.items():
                text = json.dumps(content, indent=1, sort_keys=True)
                (Path(folder) / f"{name}.json").write_text(text, encoding="utf-8")
            return self.put(folder, kind=kind)

    def get_json(self, name: str, tree: Tree | str) -> Any:
        """Reads a document that `put_json` stored."""
        return json.loads((self.get(tree) / f"{name}.json").read_text(encoding="utf-8"))

    def get(self, tree: Tree | str, progress: Progress | None = None) -> Path:
        """Returns a read-only local folder with a tree's files, verified against its manifest.

        The folder is in the cache of this node ($TRIMTAB_CACHE, default ~/.cache/trimtab), which is filled
        once; from a local store on the same file system by hard links, which take no space.

        Raises:
            InputError: not a tree of this store, or the cache cannot be written.
            StoreError: the tree or one of its files is missing or corrupted (the message names the file), or
                the disk is full; nothing of the tree is left in the cache.
        """
        digest = self._digest(tree)
        uri = f"{self.uri}/trees/{digest}"
        return bring(self._back, uri, digest, lambda: self.manifest(uri), progress)

    def manifest(self, tree: Tree | str) -> Manifest:
        """Returns what a tree holds: kind, metadata, files (path → sha256, bytes).

        Raises:
            InputError: not a tree of this store.
            StoreError: there is no such tree, or its manifest is damaged or names a path outside the tree.
        """
        digest = self._digest(tree)
        data = self._back.read(f"trees/{digest}.json")
        if data is None:
            raise Damaged(f"there is no tree {digest} in {self.uri}: it was never completed, or deleted")
        try:
            manifest = Manifest.parse(json.loads(data))
        except (ValueError, InputError) as error:
            raise Damaged(f"the manifest of {self.uri}/trees/{digest} is damaged: {error}") from None
        if manifest.digest != digest:
            raise Damaged(f"the manifest of {self.uri}/trees/{digest} is damaged: it has another digest")
        if data != _json(manifest.document, "the manifest"):  # 1e5 for 1E5: the same manifest, other bytes
            raise Damaged(f"the manifest of {self.uri}/trees/{digest} is damaged: it was written by something else")
        return manifest

    def examine(self, tree: Tree | str, progress: Progress | None = None) -> Manifest:
        """Reads every file of a tree in the store, past the cache, and returns the manifest that all of them meet.

        Raises:
            InputError: not a tree of this store.
            Damaged: the manifest or a file is missing, or has another checksum; the message names it.
            StoreError: the store could not be read.
        """
        uri = f"{self.uri}/trees/{self._digest(tree)}"
        manifest = self.manifest(uri)
        meter = Meter(manifest.size, progress)

        def hash_again(path: str) -> None:
            blob = manifest.files[path]
            found = self._back.checksum(blob_key(blob.sha256), blob.bytes, meter)
            if found != blob.sha256:
                state = "missing" if found is None else "corrupted"
                raise Damaged(f"the file {path!r} of {uri} is {state} in the store")

        in_parallel(hash_again, manifest.files, meter)
        return manifest

    def tree(self, digest: str, size: int = 0) -> Tree:
        """Returns the name of the tree with this digest in this store, wherever it was made."""
        return Tree(uri=f"{self.uri}/trees/{digest}", digest=digest, bytes=size)

    def record(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps the result of a stage (small JSON) under its key (64 hex digits); the last writer wins."""
        data = _json(value, "a result")
        self._back.prepare()
        self._back.write(f"index/{_index_key(key)}.json", data)

    def lookup(self, key: str) -> dict[str, Any] | None:
        """Returns the result recorded under a key; None when there is none, or a tree it names is gone."""
        data = self._back.read(f"index/{_index_key(key)}.json")
        try:
            value = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return value if all(self._exists(*where) for where in _trees(value)) else None

    def release(self, name: str, record: Mapping[str, Any] | Callable[[str], Mapping[str, Any]]) -> str:
        """Adds a release and returns its URI, `<store>/releases/<name>/<version>`.

        The version is one more than the highest, in six digits; two writers never take the same one.

        Args:
            record: JSON, or a function of the version that returns it, for a record that holds its own version.
        """
        make = record if callable(record) else lambda _version: record
        number = max((int(version) for version in self._versions(name)), default=0) + 1
        data = _json(make(f"{number:06d}"), "a release")
        self._back.prepare()
        while not self._back.create(f"releases/{name}/{number:06d}.json", data):
            number += 1
            data = _json(make(f"{number:06d}"), "a release")
        return f"{self.uri}/releases/{name}/{number:06d}"

    def newest(self, name: str) -> str | None:
        """Returns the URI of the newest release of this name, None when there is none; reads no record."""
        versions = self._versions(name)
        return f"{self.uri}/releases/{name}/{versions[-1]}" if versions else None

    def releases(self, name: str) -> list[dict[str, Any]]:
        """Returns [{"uri", "version", "record"}, …] of all releases of this name, oldest first."""
        uris = [(f"{self.uri}/releases/{name}/{version}", version) for version in self._versions(name)]
        return [{"uri": uri, "version": version, "record": self.read_release(uri)} for uri, version in uris]

    def read_release(self, uri: str) -> dict[str, Any]:
        """Returns the record of a release.

        Raises:
            InputError: there is no such release in this store.
            Damaged: it is not as `release` wrote it.
        """
        parts = split_release(uri)
        if not parts or not is_name(parts[1]) or canonical(parts[0]) != self.uri:
            valid = f"{self.uri}/releases/<name>/<version>"
            raise InputError(f"{uri!r} is not a release of this store: write {valid}")
        data = self._back.read(f"releases/{parts[1]}/{parts[2]}.json")
        if data is None:
            versions = ", ".join(self._versions(parts[1])[-5:]) or "none"
            raise InputError(f"there is no release {uri} (the latest are: {versions})")
        try:
            record = json.loads(data)
        except ValueError:
            raise Damaged(f"the release {uri} is damaged: it is not JSON") from None
        if not isinstance(record, dict) or _json(record, "a release") != data:
            raise Damaged(f"the release {uri} is damaged: it was written by something else")
        return record

    def pin(self, name: str, trees: Iterable[Tree | str], until: datetime | None = None) -> None:
        """Keeps trees, and what their documents name, from being collected: those that a schedule will ask for.

        Args:
            name: whose trees they are, as a release's name; an earlier pin of this name is replaced.
            until: when the pin may be forgotten; None for never.

        Raises:
            InputError: the name is not valid, `until` has no time zone, or not trees of this store.
            Damaged: one of them is not there.
        """
        if until and until.tzinfo is None:
            raise InputError(f"until: {until} has no time zone; write datetime.now(UTC) and so on")
        with leases.working(self._back):
            kept = [self.manifest(tree).digest for tree in trees]
            pinned = {"trees": kept, "until": until.isoformat() if until else None}
            self._back.prepare()
            self._back.write(f"pins/{check_name(name, 'pin')}.json", _json(pinned, "a pin"))

    def unpin(self, name: str) -> None:
        """Forgets a pin, if there is one."""
        self._back.remove(f"pins/{check_name(name, 'pin')}.json")

    def check(self) -> None:
        """Finds out in seconds whether the store can be used: reachable, right credentials, there, writable.

        Raises:
            InputError: it cannot; one sentence says what to do.
        """
        self._back.check()

    def _digest(self, tree: Tree | str) -> str:
        uri = tree.uri if isinstance(tree, Tree) else str(tree)
        parts = split_tree(uri)
        if not parts:
            raise InputError(f"{uri!r} is not a tree: write {self.uri}/trees/<64 hex digits>")
        if canonical(parts[0]) != self.uri:
            raise InputError(f"{uri} is in another store than {self.uri}: open {parts[0]}")
        return parts[1]

    def _exists(self, address: str, digest: str) -> bool:
        """Tells whether a tree is there, and keeps an old one from being collected before it is used."""
        store = self if canonical(address) == self.uri else open_store(address)
        key = f"trees/{digest}.json"
        when = store._back.modified(key)
        if when is None or not _is_old(when):
            return when is not None
        try:
            with leases.working(store._back):
                data = store._back.read(key)
                if data is not None:
                    store._back.write(key, data)
            return data is not None
        except InputError:  # a store that may only be read
            return True

    def _versions(self, name: str) -> list[str]:
        names = (entry.removesuffix(".json") for entry in self._back.names(f"releases/{check_name(name, 'release')}"))
        return sorted((entry for entry in names if entry.isdigit()), key=int)


def _json(value: Any, what: str) -> bytes:
    """Returns the canonical JSON of a mapping."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a mapping, got {type(value).__name__}")
    try:
        text = json.dumps(
            dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is not JSON: {error}") from None


def _is_old(modified: float | None) -> bool:
    return modified is None or time.time() - modified > RENEW.total_seconds()


def _index_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InputError(f"the key {key!r} is not valid: it must be 64 hex digits")
    return key


def _trees(value: Any) -> Iterator[tuple[str, str]]:
    """Yields (store, digest) of every tree that a JSON value names."""
    if isinstance(value, dict):
        uri = value.get("uri")
        parts = split_tree(uri) if isinstance(uri, str) and "digest" in value else None
        if parts:
            yield parts
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _trees(item)
