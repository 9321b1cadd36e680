"""A stage's result as a plain folder, to carry from one store to another.

`artifact.json` says what it is and under which key it is found; `files/` holds the files of its tree.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trimtab.base.errors import InputError, StoreError
from trimtab.base.schema import Document
from trimtab.store.store import Store
from trimtab.store.transfer import explained
from trimtab.store.tree import Manifest, Tree, list_files

ABOUT = "artifact.json"
FILES = "files"


class Artifact(Document):
    """What `artifact.json` holds: the stage's key, what it measured, the seconds it took, its tree's manifest.

    `digest` is that of the manifest, which holds the key too: an edited file contradicts itself.
    """

    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    metrics: dict[str, Any]
    seconds: Annotated[float, Field(ge=0)]
    digest: str
    manifest: Manifest


def export_artifact(store: Store, tree: str, folder: Path) -> Artifact:
    """Writes the result of a stage into a folder, `artifact.json` last.

    Args:
        store: holds the tree, and the record of the stage that made it.
        tree: the tree's URI or digest.
        folder: does not exist, or is empty.

    Raises:
        InputError: the folder is not empty, or the tree is not the result of a stage.
        StoreError: the store has no such tree, or failed, or the folder cannot be written.
    """
    uri = tree if "/" in tree else f"{store.uri}/trees/{tree}"
    manifest = store.manifest(uri)
    key = manifest.metadata.get("key")
    record = store.lookup(key) if key else None
    if not record or record["tree"]["digest"] != manifest.digest:
        raise InputError(
            f"tree: {uri} ({manifest.kind}) is not the result of a stage; write the tree of a calibration, "
            f"sensitivity, checkpoint or export that the page of a run names"
        )
    with explained(str(folder)):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"folder: '{folder}' is there already; write a new folder")
        shutil.copytree(store.get(uri), folder / FILES, copy_function=shutil.copyfile)
        about = Artifact(
            key=key, metrics=record["metrics"], seconds=record["seconds"], digest=manifest.digest, manifest=manifest
        )
        (folder / ABOUT).write_text(json.dumps(about.model_dump(mode="json"), indent=1), encoding="utf-8")
    return about


def import_artifact(store: Store, folder: Path) -> tuple[Tree, Artifact]:
    """Puts what `export_artifact` wrote into a store, where the stage of that key finds it.

    Everything is checked before anything is written, and the record is written last.

    Raises:
        InputError: the folder is not an artifact, or a file is missing, damaged or too many; names it.
        StoreError: the store failed, or a file changed while it was read; the result is not found then.
    """
    about = _read(folder / ABOUT)
    _check(folder / FILES, about.manifest)
    tree = store.put(folder / FILES, kind=about.manifest.kind, metadata=about.manifest.metadata)
    if tree.digest != about.digest:
        raise StoreError(f"{folder}: changed while it was imported; import it again")
    store.record(about.key, {"tree": tree.model_dump(), "metrics": about.metrics, "seconds": about.seconds})
    return tree, about


def _read(path: Path) -> Artifact:
    try:
        about = Artifact.parse(json.loads(path.read_text(encoding="utf-8")))
        if about.manifest.digest != about.digest or about.manifest.metadata.get("key") != about.key:
            raise InputError("it contradicts itself; export it again")
        return about
    except OSError as error:
        raise InputError(
            f"folder: {path} cannot be read ({error.strerror}); write a folder that `trimtab artifact export` completed"
        ) from None
    except (ValueError, InputError) as error:
        raise InputError(f"folder: {path} is damaged: {error}") from None


def _check(folder: Path, manifest: Manifest) -> None:
    found = list_files(folder)
    for path, blob in manifest.files.items():
        if path not in found:
            raise InputError(f"folder: {folder / path} is missing; copy the artifact again")
        with explained(str(folder / path)), (folder / path).open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if (found[path], checksum) != (blob.bytes, blob.sha256):
            raise InputError(f"folder: {folder / path} is damaged: it has another checksum; copy the artifact again")
    if more := sorted(found.keys() - manifest.files.keys()):
        raise InputError(f"folder: {folder / more[0]} is no part of the artifact; remove it")
