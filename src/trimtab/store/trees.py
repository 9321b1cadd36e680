"""Immutable, content-addressed trees of files in a back end, each visible when it is complete."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from trimtab.base.errors import Damaged, InputError
from trimtab.store import clock, leases
from trimtab.store.address import canonical, split_tree
from trimtab.store.cache import bring
from trimtab.store.local import blob_key
from trimtab.store.transfer import Meter, Progress, explained, in_parallel
from trimtab.store.tree import Blob, Manifest, Tree, list_files

#: A tree that is put again or looked up is written anew when it is older: see `trimtab.store.garbage`.
RENEW = timedelta(days=1)


class Trees:
    """The trees of a store, in a back end such as `trimtab.store.local.LocalBack`."""

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
                same file system (`workspace`) not copied. Nothing may write to them any more. What is not given away
                is never linked, for its owner may edit it; where the file system clones files it takes no space.
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
        metadata = json.loads(canonical_json(metadata or {}, "metadata"))
        self._back.prepare()

        def bring(lease: leases.Right) -> Manifest:
            meter = Meter(sum(sizes.values()), progress, lease.keep_up)
            sums = in_parallel(lambda path: self._back.add(places[path], sizes[path], meter, move), sizes, meter)
            files = {path: Blob(sha256=sha, bytes=sizes[path]) for path, sha in zip(sizes, sums, strict=True)}
            manifest = Manifest.parse({"kind": kind, "metadata": metadata, "files": files})
            key = f"trees/{manifest.digest}.json"
            if _is_old(self._back.modified(key)):
                self._back.write(key, canonical_json(manifest.document, "the manifest"), before=lease.until)
            return manifest

        manifest = leases.under_lease(self._back, bring)
        if move:
            for place in places.values():
                with explained(str(place)):
                    place.unlink()
        return Tree(uri=f"{self.uri}/trees/{manifest.digest}", digest=manifest.digest, bytes=manifest.size)

    def workspace(self) -> AbstractContextManager[Path]:
        """Yields an empty folder for files that will be given away to `put`: on the file system of a local store, where
        they then take no second copy, else among temporary files. It is gone afterwards."""
        return self._back.workspace()

    def put_json(self, kind: str, document: Any, **others: Any) -> Tree:
        """Stores a JSON document as a tree with one file, `<kind>.json`, and others beside it by their names."""
        with tempfile.TemporaryDirectory(prefix=f"trimtab-{kind}-") as folder:
            for name, content in {kind: document, **others}.items():
                text = json.dumps(content, indent=1, sort_keys=True)
                (Path(folder) / f"{name}.json").write_text(text, encoding="utf-8")
            return self.put(folder, kind=kind)

    def get_json(self, name: str, tree: Tree | str) -> Any:
        """Reads a document that `put_json` stored, from the store itself."""
        return json.loads(self.read(tree, f"{name}.json"))

    def read(self, tree: Tree | str, path: str) -> bytes:
        """Returns a small file of a tree from the store itself, past the cache of this node, which tasks may write.

        Raises:
            InputError: not a tree of this store.
            Damaged: the manifest or the file is missing, or has another checksum; the message names it.
            StoreError: the store could not be read.
        """
        uri = f"{self.uri}/trees/{self._digest(tree)}"
        blob = self.manifest(uri).files.get(path)
        data = self._back.read(blob_key(blob.sha256)) if blob else None
        if data is None or hashlib.sha256(data).hexdigest() != blob.sha256:
            state = "missing" if data is None else "corrupted"
            raise Damaged(f"the file {path!r} of {uri} is {state} in the store")
        return data

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
        if data != canonical_json(manifest.document, "the manifest"):  # 1e5 for 1E5: the same manifest, other bytes
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

    def _keep(self, digest: str) -> bool:
        """Tells whether a tree is there, and keeps an old one from being collected before it is used."""
        key = f"trees/{digest}.json"
        when = self._back.modified(key)
        if when is None or not _is_old(when):
            return when is not None
        try:
            return leases.under_lease(self._back, lambda lease: self._renew(digest, lease))
        except InputError:  # a store that may only be read
            return True

    def _renew(self, digest: str, lease: leases.Right) -> bool:
        """Tells whether a tree is there, and makes an old one young again."""
        key = f"trees/{digest}.json"
        when = self._back.modified(key)
        data = self._back.read(key) if _is_old(when) else None
        if data is not None:
            self._back.write(key, data, before=lease.until)
        return data is not None or (when is not None and not _is_old(when))


def canonical_json(value: Any, what: str) -> bytes:
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
    return modified is None or clock.now() - modified > RENEW.total_seconds()
