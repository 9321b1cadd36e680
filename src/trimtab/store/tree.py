"""A tree: an immutable folder in the store, named by its content."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from trimtab.base.errors import InputError
from trimtab.base.schema import Document, digest


class Tree(Document):
    """A folder in the store: its URI, the digest that the URI ends in, and its size in bytes."""

    uri: str
    digest: str
    bytes: int = 0


class Blob(Document):
    """The content of one file: its SHA-256 in 64 hex digits, and its size in bytes."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(Document):
    """What a tree holds: kind, metadata, and for each file (path with '/', relative) its content.

    All three are part of the digest: trees that differ in metadata only are two trees that share their
    blobs, so no metadata is ever lost to an earlier tree with the same files.
    """

    kind: Annotated[str, Field(min_length=1)]
    metadata: dict[str, Any] = {}
    files: dict[str, Blob]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, Blob]) -> dict[str, Blob]:
        for path in files:
            if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(f"has the path {path!r}, which is not a plain path inside the tree")
        return files

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(blob.bytes for blob in self.files.values())

    @property
    def document(self) -> dict[str, Any]:
        """The manifest as plain data, with every field."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """The SHA-256 of the canonical JSON of the manifest: the name of the tree."""
        return digest(self.document)


@dataclass(frozen=True)
class Entry:
    """An object of the store in a listing: its key, its size in bytes, and when it was written, seconds since 1970.

    A file of a folder also says which bytes of the disk it takes, how many names it has (`links`, of which those in the
    cache of the node are others), and its device and inode, `identity`.
    """

    key: str
    bytes: int
    modified: float
    on_disk: int
    links: int = 1
    identity: tuple[int, int] | None = None


def list_files(folder: Path) -> dict[str, int]:
    """Returns the files below `folder` (path relative to it, with '/' → bytes), sorted by path.

    A link to a file inside the folder counts as that file. Empty folders are not part of a tree.

    Raises:
        InputError: not a folder, or an entry that a tree cannot hold: a link that leaves the folder or leads
            to no file, a device or a socket, a name that is not UTF-8 or contains a backslash.
    """
    try:
        root = Path(os.path.realpath(folder))
        if not root.is_dir():
            raise InputError(f"{folder} is not a folder: pass the folder whose files make up the tree")
        return dict(sorted(_walk(root, root)))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None


def _walk(where: Path, root: Path):
    with os.scandir(where) as entries:
        for entry in entries:
            path = Path(entry.path).relative_to(root).as_posix()
            if "\\" in path or not _is_text(path):
                raise InputError(f"{entry.path!r}: rename it, names must be UTF-8 without backslash")
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not target.is_relative_to(root):
                    raise InputError(f"{entry.path} is a link that leaves the folder: replace it by a copy")
                if not target.is_file():
                    raise InputError(f"{entry.path} is a link that leads to no file: replace it by a copy")
            elif entry.is_dir():
                yield from _walk(Path(entry.path), root)
                continue
            elif not entry.is_file():
                raise InputError(f"{entry.path} is neither a file nor a folder: remove it")
            yield path, entry.stat().st_size


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
