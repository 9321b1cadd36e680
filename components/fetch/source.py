"""Where a model comes from: a folder, a GGUF file, a tree of the store, an S3 prefix, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.base import progress, transient
from trimtab.base.child import call
from trimtab.base.errors import InputError, Transient
from trimtab.base.schema import digest
from trimtab.model import layouts
from trimtab.model.admission import Admitted, admit
from trimtab.model.facts import ModelFacts
from trimtab.model.files import COMPANIONS
from trimtab.model.licence import CARD, LICENCE, licence_of
from trimtab.recipe import files
from trimtab.store import Store, open_store
from trimtab.store.address import split_source, split_tree
from trimtab.store.s3 import S3Back
from trimtab.store.tree import Tree

#: The most that an artifact has which names a tree.
ARTIFACT_BYTES = 4096
#: A part of the hub's names begins with no dot or dash, so that ./name and ../name are paths.
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
#: Never pickles: they run code when they are loaded.
_MODEL_FILES = (".safetensors", *COMPANIONS, CARD)
#: Mistral's own form of its weights, as large as the model, and what lies in folders below it.
_NOT_MODEL_FILES = ["consolidated*", "*/*"]
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def fetch(model: str, store: Store) -> Tree:
    """Returns the model's tree in the store, with its facts in the metadata.

    Args:
        model: a folder or .gguf file, `s3://bucket/prefix`, `<store>/trees/<digest>`, a hub id `org/name`, or the
            address of a Model artifact of an earlier run, which names such a tree; `minio://…`, as KFP calls its own
            store, is read as `s3://…`.

    Raises:
        InputError: it does not exist, is damaged, holds pickles only, or needs code of its own.
        StoreError: the store cannot be read or written.
    """
    model = _of_s3(model)
    path = Path(model).expanduser()
    if (tree := split_tree(model)) and not path.exists():
        other = open_store(tree[0])
        said = other.manifest(model).metadata
        return _put(other.get(model), store, said=said.get(layouts.CONVERTED, ()), licence=said.get(LICENCE))
    if named := _named_by_artifact(model, path):
        return fetch(named, store)
    if model.startswith("s3://"):
        return _put_downloaded(lambda folder: _download_from_s3(model, folder), store)
    if _is_gguf(path):
        return _put_gguf(gguf_parts(path), store)
    if path.exists():
        return _put(path, store)
    if re.fullmatch(_HUB_ID, model):
        return _put_downloaded(lambda folder: _download_from_hub(model, folder), store)
    raise InputError(_unknown(model))


def check(model: str) -> str:
    """Returns the address with a local path made absolute; refuses a damaged local model in a second.

    Raises:
        InputError: as `fetch`, for what can be seen without reading the weights.
    """
    path = Path(model).expanduser()
    if path.exists():
        if _is_gguf(path):
            gguf_parts(path)
        elif not _named_by_artifact(model, path):
            _told(admit(path))
        return str(path.absolute())
    if _of_s3(model).startswith("s3://"):
        split_source(_of_s3(model))
        return model
    if split_tree(model) or re.fullmatch(_HUB_ID, model):
        return model
    raise InputError(_unknown(model))


def facts(model: str) -> ModelFacts:
    """Returns the facts of a local model folder, for `trimtab plan`.

    Raises:
        InputError: it is not a folder with a model.
    """
    return admit(model).facts


def gguf_parts(path: Path) -> list[Path]:
    """Returns the files of a GGUF model: the file, or for one of llama.cpp's `…-00001-of-0000N.gguf` all of them.

    Raises:
        InputError: a part is missing.
    """
    match = _GGUF_PART.fullmatch(path.name)
    if not match:
        return [path]
    beside = {other.name.lower(): other for other in path.parent.iterdir()}
    parts = []
    for number in range(1, int(match[3]) + 1):
        name = f"{match[1]}-{number:05d}-of-{match[3]}.gguf"
        if name.lower() not in beside:
            raise InputError(f"model: {path.parent / name} is missing, a part of the same model; download it")
        parts.append(beside[name.lower()])
    return parts


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _unknown(model: str) -> str:
    return (
        f"model: '{model}' does not exist; write a folder with config.json and *.safetensors, a .gguf file, "
        f"s3://bucket/prefix or a hub id such as org/name"
    )


def _put(
    folder: Path,
    store: Store,
    move: bool = False,
    said: Sequence[str] = (),
    licence: Mapping[str, str] | None = None,
) -> Tree:
    """Puts a folder's model into the store; `said` is what was converted before it came there, and `licence` the one
    that was known then, else that of its files."""
    model = _told(admit(folder))
    licence = licence or licence_of(folder)
    if not model.layout.as_stored:
        return _put_converted(folder, model, store, licence)
    return _put_files(model, store, move, said, licence)


def _put_files(
    model: Admitted, store: Store, move: bool, converted: Sequence[str], licence: Mapping[str, str]
) -> Tree:
    progress.report("fetch", f"{model.facts.parameters / 1e6:,.0f} million parameters into the store")
    metadata: dict[str, Any] = {"facts": model.facts.model_dump(mode="json")}
    if converted:
        metadata[layouts.CONVERTED] = list(converted)
    if licence:
        metadata[LICENCE] = dict(licence)
    return store.put(model.files, kind="checkpoint", metadata=metadata, move=move)


def _told(model: Admitted) -> Admitted:
    """Names what lies beside the model, and what its source stores otherwise than the house does."""
    if model.left_out:
        progress.report("fetch", f"left out, not the model: {', '.join(model.left_out)}")
    for sentence in model.layout.sentences:
        progress.report("fetch", sentence)
    return model


def _put_converted(folder: Path, model: Admitted, store: Store, licence: Mapping[str, str]) -> Tree:
    """Puts the model into the house's layout, once: the key is the content of its files."""
    stored = sum(path.stat().st_size for path in model.files.values())
    sizes = f"{stored / 1e9:,.1f} GB as stored, {model.facts.bytes / 1e9:,.1f} GB converted"
    progress.report("fetch", f"{sizes}; disk is needed for both")
    sums = {name: files.sha256(path) for name, path in model.files.items()}

    def put() -> Tree:
        with store.workspace() as made:
            call("trimtab.components.fetch.conversion:convert", source=str(folder), output=str(made))
            return _put_files(admit(made), store, move=True, converted=model.layout.sentences, licence=licence)

    return _once(digest(["layout", sums, layouts.VERSION, *([dict(licence)] if licence else [])]), put, store)


def _once(key: str, put: Callable[[], Tree], store: Store) -> Tree:
    """Returns the tree that is recorded under the key, else what `put` puts."""
    record = store.lookup(key)
    if record:
        return Tree.model_validate(record["tree"])
    tree = put()
    store.record(key, {"tree": tree.model_dump()})
    return tree


def _put_downloaded(download: Callable[[Path], None], store: Store) -> Tree:
    with store.workspace() as folder:
        download(folder)
        return _put(folder, store, move=True)


def _put_gguf(parts: list[Path], store: Store) -> Tree:
    """Converts once: the key is the content of the files."""

    def convert(folder: Path) -> None:
        progress.report("fetch", f"converting {parts[0].name} to safetensors in bfloat16")
        call("trimtab.components.fetch.gguf:convert", paths=[str(part) for part in parts], output=str(folder))

    key = digest(["gguf", *(files.sha256(part) for part in parts), 3, layouts.VERSION])
    return _once(key, lambda: _put_downloaded(convert, store), store)


def _of_s3(model: str) -> str:
    """Returns the address of S3 for one that KFP's page shows: its own store speaks S3 and is called minio."""
    return re.sub("^minio://", "s3://", model)


def _named_by_artifact(model: str, path: Path) -> str | None:
    """Returns the tree that a Model artifact of a run names, as `stages.describe_tree` wrote it; None for all else."""
    if model.startswith("s3://"):
        bucket, key = split_source(model)
        data = S3Back(bucket, "").read(key) if key else None
    else:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= ARTIFACT_BYTES else None
    if not data or len(data) > ARTIFACT_BYTES:
        return None
    try:
        return Tree.parse(data.decode()).uri
    except (InputError, UnicodeDecodeError):
        return None


def _download_from_s3(model: str, folder: Path) -> None:
    progress.report("fetch", f"downloading {model}")
    bucket, prefix = split_source(model)
    S3Back(bucket, prefix).download(folder, _MODEL_FILES, without=_NOT_MODEL_FILES)


def _download_from_hub(model: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    progress.report("fetch", f"downloading {model} from the Hugging Face hub")
    with from_hub(model):
        patterns = [f"*{suffix}" for suffix in _MODEL_FILES]
        snapshot_download(
            model,
            local_dir=folder,
            allow_patterns=patterns,
            ignore_patterns=_NOT_MODEL_FILES,
            token=os.environ.get("HF_TOKEN"),
        )


@contextmanager
def from_hub(model: str, what: str = "") -> Iterator[None]:
    """Turns what the hub's client raises into one sentence; `what` of the model is asked for, "" for all of it.

    Raises:
        Transient: the hub is busy, or the connection broke.
        InputError: it has no such model, or there is no way to it.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        lacking = f"{what} cannot" if what else "cannot"
        if transient.passes(error) and not isinstance(error, OfflineModeIsEnabled):
            raise Transient(
                f"model: '{model}' {lacking} be had from the Hugging Face hub now ({first}); run it again"
            ) from None
        raise InputError(
            f"model: '{model}' is no folder here and {lacking} be had from the Hugging Face hub ({first}); check "
            f"the name, the network, or set HF_TOKEN for a gated model"
        ) from None
