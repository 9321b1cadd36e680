"""A release as an OCI image or artifact: a layout on disk, which `skopeo` and `oras` copy, or pushed to a registry.

| form | what it is | who takes it |
|---|---|---|
| `modelcar` | an image, for amd64 and arm64, with the model and its papers below /models, a file a layer | KServe's `oci://`, image volumes of Kubernetes |
| `artifact` | the files themselves as titled layers | `oras pull` |

The signed statement stands beside them: /trimtab/statement.intoto.json in an image, `statement.intoto.json` in an
artifact. Everything is dated as the release is, so that one release has one digest, whoever packs it.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from trimtab.base.errors import InputError, StoreError

Form = Literal["modelcar", "artifact"]
#: The signed statement, beside the model and its papers.
STATEMENT = "statement.intoto.json"
#: What an artifact says it is.
ARTIFACT = "application/vnd.trimtab.release.v1"
#: The most layers that overlayfs stacks, as Docker and containerd allow them, is 127; a base has some.
MOST_FILES = 120
#: The tag in a layout's index.
TAG = "latest"

_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_EMPTY = "application/vnd.oci.empty.v1+json"
_ENVELOPE = "application/vnd.in-toto+json"
_TITLE, _REFERENCE = "org.opencontainers.image.title", "org.opencontainers.image.ref.name"
#: Larger blobs are sent in parts, of 16 MB: a request of gigabytes would be held in memory.
_AT_ONCE = 16 << 20
_NAMED = re.compile(r"(localhost|[^/]*[.:][^/]*)/[a-z0-9._/-]+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_reference(reference: str) -> None:
    """Refuses what names no registry, repository and tag.

    Raises:
        InputError: says what to write.
    """
    if not _NAMED.fullmatch(reference):
        raise InputError(
            f"image: '{reference}' is not valid; write REGISTRY/REPOSITORY:TAG, or oci:FOLDER for a folder on disk"
        )


def pack(
    files: Path, envelope: Mapping[str, Any], layout: Path, form: Form, annotations: Mapping[str, str], issued: datetime
) -> str:
    """Moves the files of a pulled release into a new OCI image layout; returns the digest of what it holds.

    Args:
        files: the model's folder with its papers, which is empty afterwards: there is never more than one copy of a
            file, and of an image its layer.
        envelope: the signed statement.
        layout: a new folder; its index has one entry, tagged `latest`.
        annotations: of the image or artifact.
        issued: the date of everything.

    Raises:
        InputError: an image cannot have so many layers, or the package for images is missing.
    """
    found = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    if form == "modelcar" and len(found) > MOST_FILES:
        raise InputError(
            f"form: a modelcar has a layer for each of {len(found)} files, and nodes stack 127 at most; "
            f"write --form artifact, or serve it from s3://… or pvc://…"
        )
    blobs = _Blobs(layout)
    statement = json.dumps(envelope, sort_keys=True).encode()
    created = {"org.opencontainers.image.created": _text(issued), **annotations}
    if form == "artifact":
        layers = [blobs.move(files / path, _octets(path), path) for path in found]
        layers.append(blobs.add(statement, _ENVELOPE, **{_TITLE: STATEMENT}))
        manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "artifactType": ARTIFACT,
                    "config": blobs.add(b"{}", _EMPTY), "layers": layers, "annotations": created}  # fmt: skip
        top = blobs.add(_json(manifest), _MANIFEST)
    else:
        base = _base(layout)
        layers = [blobs.tar(files / path, f"models/{path}", issued) for path in found]
        (files / STATEMENT).write_bytes(statement)
        layers.append(blobs.tar(files / STATEMENT, f"trimtab/{STATEMENT}", issued))
        top = blobs.add(_json(_extended(blobs, base, layers, created, issued)), _INDEX)
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [{**top, "annotations": {_REFERENCE: TAG}}]}
    (layout / "index.json").write_bytes(_json(index))
    (layout / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return top["digest"]


def push(layout: Path, reference: str, plain_http: bool = False) -> None:
    """Sends a layout to a registry, whose credentials are those of `docker login` or `podman login`.

    Raises:
        InputError: the registry refuses the credentials or the name, or the package `oras` is missing.
        StoreError: it does not answer, or not as registries do; what is there already is not sent again.
    """
    import requests

    check_reference(reference)
    blobs = _Blobs(layout)
    (top,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifests = list(blobs.manifests(top))
    try:
        registry, container = _registry(reference, plain_http)
        for manifest in manifests:
            said = blobs.read(manifest)
            for blob in (said["config"], *said["layers"]) if manifest["mediaType"] == _MANIFEST else ():
                path = str(blobs.path(blob["digest"]))
                _check(registry.upload_blob(path, container, blob, do_chunked=blob["size"] > _AT_ONCE), reference)
            tag = container.tag if manifest is manifests[-1] else manifest["digest"]
            answered = registry.do_request(
                f"{registry.prefix}://{container.registry}/v2/{container.api_prefix}/manifests/{tag}",
                "PUT",
                data=blobs.path(manifest["digest"]).read_bytes(),
                headers={"Content-Type": manifest["mediaType"]},
            )
            _check(answered, reference)
    except requests.RequestException as error:
        hint = "; write --plain-http where it speaks no TLS" if isinstance(error, requests.exceptions.SSLError) else ""
        raise StoreError(f"{reference}: the registry does not answer ({type(error).__name__}){hint}") from None
    except ValueError as error:  # of oras, which finds no way to log in, or was sent nowhere
        raise InputError(f"image: {reference} cannot be pushed ({error}); log in with `podman login`") from None


def _registry(reference: str, plain_http: bool) -> tuple[Any, Any]:
    """Returns oras's client of a registry, with credentials where there are any, and oras's parts of the reference."""
    try:
        from oras.provider import Registry
    except ModuleNotFoundError as error:
        raise InputError(f"push: the package {error.name} is missing; pip install 'trimtab[oci]'") from None

    class Client(Registry):
        def do_request(self, *request: Any, **more: Any) -> Any:
            # oras waits two minutes and more over any trouble, of a password too, and shows an expired token again.
            send = Registry.do_request.__wrapped__
            answered = send(self, *request, **more)
            if answered.status_code == 401 and getattr(self.auth, "token", None):
                self.auth.token = None
                answered = send(self, *request, **more)
            return answered

    registry = Client(insecure=plain_http)
    container = registry.get_container(reference)
    asked = registry.session.get(f"{registry.prefix}://{container.registry}/v2/", timeout=60)
    if by_password := asked.headers.get("WWW-Authenticate", "").lower().startswith("basic"):
        registry = Client(insecure=plain_http, auth_backend="basic")
    registry.auth.load_configs(container, configs=[path for path in _logins() if os.path.exists(path)])
    if by_password and not getattr(registry.auth, "_basic_auth", None):
        raise ValueError("it asks for a password, and there is none for it")
    return registry, container


def _logins() -> tuple[str, ...]:
    """Where the tools of containers keep credentials."""
    return (
        os.environ.get("REGISTRY_AUTH_FILE", ""),
        os.path.join(os.environ.get("XDG_RUNTIME_DIR", "/run"), "containers/auth.json"),
        os.path.join(os.environ.get("DOCKER_CONFIG", os.path.expanduser("~/.docker")), "config.json"),
    )


def _check(response: Any, reference: str) -> None:
    if response.status_code in (401, 403):
        raise InputError(f"image: {reference} may not be pushed ({response.status_code}); log in with `podman login`")
    if not response.ok:
        raise StoreError(f"{reference}: the registry answers {response.status_code}: {response.text[:200]}")


class _Blobs:
    """The blobs of a layout, by their digests."""

    def __init__(self, layout: Path):
        self.folder = layout / "blobs" / "sha256"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")

    def read(self, descriptor: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(self.path(descriptor["digest"]).read_bytes())

    def manifests(self, top: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yields the manifests below one, and last itself."""
        if top["mediaType"] == _INDEX:
            yield from self.read(top)["manifests"]
        yield top

    def add(self, data: bytes, media_type: str, **annotations: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return _descriptor(media_type, digest, len(data), annotations)

    def move(self, path: Path, media_type: str, title: str) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        os.replace(path, self.folder / digest)
        return _descriptor(media_type, digest, size, {_TITLE: title})

    def tar(self, path: Path, inside: str, issued: datetime) -> dict[str, Any]:
        """Moves a file into a tar of its own; GNU's format holds more than 8 GB for every reader."""
        packed = self.folder / "partial"
        with tarfile.open(packed, "w", format=tarfile.GNU_FORMAT) as tar, path.open("rb") as file:
            member = tarfile.TarInfo(inside)
            member.size, member.mode, member.mtime = path.stat().st_size, 0o644, int(issued.timestamp())
            tar.addfile(member, file)
        path.unlink()
        return self.move(packed, _LAYER, path.name)


def _base(layout: Path) -> dict[str, Any]:
    """Lays the image into the layout that has nothing but what KServe starts in it, and returns its index."""
    try:
        from modelcar_base_image.embedded_oci_layout import embedded_oci_layout
    except ModuleNotFoundError:
        raise InputError("push: the package modelcar-base-image is missing; pip install 'trimtab[oci]'") from None
    embedded_oci_layout(layout)
    blobs = _Blobs(layout)
    (top,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    base = blobs.read(top)
    blobs.path(top["digest"]).unlink()
    return base


def _extended(
    blobs: _Blobs, base: dict[str, Any], layers: list[dict[str, Any]], created: Mapping[str, str], issued: datetime
) -> dict[str, Any]:
    """Returns the index of the base image with the layers on top, for each of its machines."""
    steps = [
        {"created": _text(issued), "created_by": f"trimtab push: {layer['annotations'][_TITLE]}"} for layer in layers
    ]
    for each in base["manifests"]:
        manifest = blobs.read(each)
        config = blobs.read(manifest["config"])
        blobs.path(each["digest"]).unlink()
        blobs.path(manifest["config"]["digest"]).unlink()
        below = [{"created": _text(issued), "created_by": "modelcar-base-image"} for _ in manifest["layers"]]
        config["created"], config["history"] = _text(issued), [*below, *steps]
        config["rootfs"]["diff_ids"] += [layer["digest"] for layer in layers]  # not compressed: both are of the tar
        manifest |= {
            "config": blobs.add(_json(config), manifest["config"]["mediaType"]),
            "layers": [*manifest["layers"], *layers],
            "annotations": dict(created),
        }
        each |= {key: value for key, value in blobs.add(_json(manifest), _MANIFEST).items() if key != "mediaType"}
    return {**base, "annotations": dict(created)}


def _descriptor(media_type: str, digest: str, size: int, annotations: Mapping[str, str]) -> dict[str, Any]:
    more = {"annotations": dict(annotations)} if annotations else {}
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size, **more}


def _octets(path: str) -> str:
    return {"json": "application/json", "md": "text/markdown"}.get(path.rpartition(".")[2], "application/octet-stream")


def _text(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
