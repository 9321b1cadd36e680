"""The releases of a store: which there are, taking one with its papers, and taking one back."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trimtab.base import signing
from trimtab.base.errors import Damaged, InputError, NotVerified
from trimtab.recipe import Recipe
from trimtab.release import statement
from trimtab.release.verification import Verified
from trimtab.store import Store, Tree
from trimtab.store.address import split_release
from trimtab.store.transfer import explained

#: How the pins begin that say what services serve: `serving.<namespace>.<service>`.
SERVING = "serving."


@dataclass(frozen=True)
class Listed:
    """A release in a list, by what its statement says; `serves` names the services, `withdrawn` says when and why."""

    uri: str
    name: str
    version: str
    issued: datetime | None = None
    recipe: str = ""
    goal: str = ""
    reason: str = ""
    bytes: int = 0
    signed_by: str = ""
    serves: tuple[str, ...] = ()
    withdrawn: str = ""


def releases(store: Store, name: str = "") -> list[Listed]:
    """Returns the releases of a name, or of all, newest first; nothing is verified."""
    found = []
    for each in [name] if name else store.names():
        rows = [_listed(store, entry["uri"], each, entry["version"], entry["record"]) for entry in store.releases(each)]
        for version, said in store.withdrawn(each).items():
            why = f"{said['withdrawn'][:10]}: {said['reason']}"
            rows.append(Listed(f"{store.uri}/releases/{each}/{version}", each, version, withdrawn=why))
        found += sorted(rows, key=lambda row: int(row.version), reverse=True)
    return found


def serving(store: Store, digest: str) -> tuple[str, ...]:
    """Returns the services that serve an artifact, as rollouts wrote down."""
    pins = store.pinned(SERVING)
    return tuple(sorted(name.removeprefix(SERVING) for name, trees in pins.items() if digest in trees))


def withdraw(store: Store, uri: str, reason: str) -> None:
    """Takes a release back, unless a service serves it.

    Raises:
        InputError: there is no such release, or one serves it.
    """
    artifact = store.read_release(uri).get("artifact") or {}
    if services := serving(store, artifact.get("digest", "")):
        raise InputError(f"release: {uri} serves {', '.join(services)}; roll out another one first")
    store.withdraw(uri, reason)


def keep_newest(store: Store, name: str, count: int, reason: str) -> list[str]:
    """Withdraws all releases of a name but the newest `count` and those that serve; returns what was withdrawn."""
    if count < 1:
        raise InputError(f"keep: {count} is not valid; write 1 or more")
    gone = []
    for entry in store.releases(name)[:-count]:
        artifact = entry["record"].get("artifact") or {}
        if not serving(store, artifact.get("digest", "")):
            store.withdraw(entry["uri"], reason)
            gone.append(entry["uri"])
    return gone


def pull(store: Store, found: Verified, folder: Path) -> list[str]:
    """Lays the files of a verified release into a new folder, with its papers beside them; returns their names.

    Raises:
        InputError: the folder is there already and not empty, or cannot be written.
        StoreError: the store failed; the folder is then not complete.
    """
    said = found.predicate
    with explained(str(folder)):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"folder: '{folder}' is there already; write a new folder")
        shutil.copytree(store.get(store.tree(said.artifact.digest)), folder, copy_function=_copy, dirs_exist_ok=True)
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _check(store, said.artifact, folder)
        if said.papers:
            tree = store.tree(said.papers.digest)
            for path in store.manifest(tree).files:
                (folder / path).write_bytes(store.read(tree, path))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _check(store: Store, artifact: Tree, folder: Path) -> None:
    """What came through the cache of this node, which others may write, must be what the store has."""
    for path, blob in store.manifest(store.tree(artifact.digest)).files.items():
        with (folder / path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.sha256:
                raise Damaged(f"{folder / path} is not what was released: empty the cache of this node, TRIMTAB_CACHE")


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)


def _listed(store: Store, uri: str, name: str, version: str, record: dict) -> Listed:
    try:
        said = statement.read(signing.unseal(record.get("attestation"))).predicate
    except NotVerified:
        return Listed(uri, name, version, reason="its statement is damaged")
    recipe = Recipe.parse(said.evidence["recipe"])
    return Listed(
        uri,
        name,
        version,
        said.issued,
        recipe.title,
        said.evidence["goal"],
        said.verdict["reason"],
        store.manifest(store.tree(said.artifact.digest)).size,
        record.get("signed_by", ""),
        serving(store, said.artifact.digest),
    )


def located(store: Store, release: str) -> str:
    """Returns the URI of a release that is named by its URI, name/version, or a name for its newest.

    Raises:
        InputError: there is none of that name.
    """
    _, name, version = split_release(release) or ("", *release.partition("/")[::2])
    uri = f"{store.uri}/releases/{name}/{version}" if version else store.newest(name)
    if uri is None:
        raise InputError(f"release: {store.uri} has no release '{name}'; write the URI that a run printed")
    return uri


