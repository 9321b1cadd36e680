"""The content of the local files that a recipe names, as a part of a stage's key: an edited file is another input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trimtab.base.schema import digest
from trimtab.recipe import Source


def with_files(parameters: Mapping[str, Any], sources: Iterable[Source]) -> dict[str, Any]:
    """Returns the parameters with "files", {path: SHA-256}, where the sources name files that can be read here.

    A dataset in a local folder counts as one file. What is not here is left out: the key may be computed on
    another machine than the work, and the work says itself what it lacks.
    """
    found = {}
    for source in sources:
        path = source.text if source.dataset is None else source.dataset
        content = None if source.text == "builtin" else _content(Path(path))
        if content:
            found[path] = content
    return {**parameters, "files": found} if found else dict(parameters)


def without(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters as the recipe has them, for the work."""
    return {name: value for name, value in parameters.items() if name != "files"}


def _content(path: Path) -> str | None:
    try:
        if path.is_dir():
            parts = sorted(part for part in path.rglob("*") if part.is_file())
            return digest({part.relative_to(path).as_posix(): sha256(part) for part in parts})
        return sha256(path) if path.is_file() else None
    except OSError:
        return None


def sha256(path: Path) -> str:
    """Returns the digest of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
