"""Packs a release for registries of containers: verified, with its papers, into a folder on disk or to a registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from trimtab.base.errors import InputError
from trimtab.pipelines import api
from trimtab.pipelines.inputs import check_choice
from trimtab.release import packing, shelf
from trimtab.release.verification import Verified
from trimtab.store.transfer import explained

#: How a target begins that is an OCI image layout on disk, as `skopeo` and `podman` write it.
LAYOUT = "oci:"


@dataclass(frozen=True)
class Pushed:
    """What was pushed: `found` is the release, `where` the target, pinned by `digest` where it is in a registry."""

    found: Verified
    where: str
    digest: str


def push(
    release: str,
    target: str,
    store: str | Path = "",
    keys: Sequence[str | Path] = (),
    *,
    form: packing.Form = "modelcar",
    plain_http: bool = False,
) -> Pushed:
    """Verifies a release and packs its files, its papers and its signed statement as an OCI image or artifact.

    Args:
        release, store, keys: as for `trimtab.verify`.
        target: REGISTRY/REPOSITORY:TAG, or oci:FOLDER for a new OCI image layout on disk, which takes as much room as
            the model. For a registry as much is taken in the folder for temporary files meanwhile.
        form: `modelcar`, an image that KServe serves as oci://…, or `artifact`, for `oras pull`.
        plain_http: whether the registry speaks no TLS.

    Raises:
        NotVerified: it must not be used; nothing is written.
        InputError: there is no such release, a key or the target is not valid, or the registry refuses it.
        StoreError: the store could not be read, or the registry does not answer.
    """
    check_choice("form", form, get_args(packing.Form))
    on_disk = Path(target.removeprefix(LAYOUT)) if target.startswith(LAYOUT) else None
    if on_disk is None:
        packing.check_reference(target)
    elif on_disk.exists() or not on_disk.absolute().parent.is_dir():
        raise InputError(f"image: '{on_disk}' is there already or has no parent; write oci: and a new folder")
    opened = api.store_of(release, store)
    found = api.verify(release, store, keys)
    with (
        explained(str(on_disk or tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix=".trimtab-push-", dir=on_disk and on_disk.absolute().parent) as folder,
    ):
        files, layout = Path(folder) / "files", Path(folder) / "layout"
        shelf.pull(opened, found, files)
        said = found.predicate
        about = {
            "org.opencontainers.image.title": said.name,
            "org.opencontainers.image.version": said.version,
            "trimtab.release": f"{said.name}/{said.version}",
            "trimtab.artifact": f"sha256:{said.artifact.digest}",
        }
        envelope = opened.read_release(found.uri)["attestation"]
        digest = packing.pack(files, envelope, layout, form, about, said.issued)
        if on_disk:
            shutil.move(layout, on_disk)
            return Pushed(found, target, digest)
        packing.push(layout, target, plain_http)
        return Pushed(found, f"{target.rpartition(':')[0]}@{digest}", digest)
