"""Where a model comes from: a folder, a GGUF file, a tree of the store, an S3 prefix, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from trimtab import files, progress
from trimtab.child import call
from trimtab.errors import InputError
from trimtab.model import ModelFacts, inspect
from trimtab.schema import digest
from trimtab.store import Store, open_store
from trimtab.store.address import canonical
from trimtab.store.s3 import S3Back
from trimtab.store.tree import Tree

#: Never pickles: they run code when they are loaded.
#: A part of the hub's names begins with no dot or dash, so that ./name and ../name are paths.
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")


def fetch(model: str, store: Store) -> Tree:
    """Returns the model's tree in the store, with its facts in the metadata.

    Args:
        model: a folder or .gguf file, `s3://bucket/prefix`, `<store>/trees/<digest>`, or a hub id `org/name`.

    Raises:
        InputError: it does not exist, is damaged, holds pickles only, or needs code of its own.
        StoreError: the store cannot be read or written.
    """
    if "/trees/" in model:
        tree = open_store(model.split("/trees/")[0]).get(model)
        return _put(tree, store)
    if model.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="trimtab-fetch-") as folder:
            progress.report("fetch", f"downloading {model}")
            bucket, _, prefix = canonical(model).removeprefix("s3://").partition("/")
            S3Back(bucket, prefix).download(Path(folder), _MODEL_FILES)
            return _put(Path(folder), store, move=True)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _put_gguf(path, store)
    if path.exists():
        return _put(path, store)
    if re.fullmatch(_HUB_ID, model):
        with tempfile.TemporaryDirectory(prefix="trimtab-fetch-") as folder:
            _download_from_hub(model, folder)
            return _put(Path(folder), store, move=True)
    raise InputError(_unknown(model))


def check(model: str) -> str:
    """Returns the address with a local path made absolute; refuses a damaged local model in a second.

    Raises:
        InputError: as `fetch`, for what can be seen without reading the weights.
    """
    path = Path(model).expanduser()
    if model.startswith("s3://") or not path.exists():
        if model.startswith("s3://") or re.fullmatch(_HUB_ID, model):
            return model
        raise InputError(_unknown(model))
    if path.suffix != ".gguf":
        inspect(path)
    return str(path.absolute())


def facts(model: str) -> ModelFacts:
    """Returns the facts of a local model folder, for `trimtab plan`.

    Raises:
        InputError: it is not a folder with a model.
    """
    return inspect(Path(model))


def _unknown(model: str) -> str:
    return (
        f"model: '{model}' does not exist; write a folder with config.json and *.safetensors, a .gguf file, "
        f"s3://bucket/prefix or a hub id such as org/name"
    )


def _put(folder: Path, store: Store, move: bool = False) -> Tree:
    facts = inspect(folder)
    progress.report("fetch", f"{facts.parameters / 1e6:,.0f} million parameters into the store")
    return store.put(folder, kind="checkpoint", metadata={"facts": facts.model_dump(mode="json")}, move=move)


def _put_gguf(path: Path, store: Store) -> Tree:
    """Converts once: the key is the file's content."""
    key = digest(["gguf", files.sha256(path), 1])
    record = store.lookup(key)
    if record:
        return Tree.model_validate(record["tree"])
    progress.report("fetch", f"converting {path.name} to safetensors in bfloat16")
    with tempfile.TemporaryDirectory(prefix="trimtab-fetch-") as folder:
        call("trimtab.components.fetch.gguf:convert", path=str(path), output=folder)
        tree = _put(Path(folder), store, move=True)
    store.record(key, {"tree": tree.model_dump()})
    return tree


def _download_from_hub(model: str, folder: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress.report("fetch", f"downloading {model} from the Hugging Face hub")
    try:
        patterns = [f"*{suffix}" for suffix in _MODEL_FILES]
        snapshot_download(model, local_dir=folder, allow_patterns=patterns, token=os.environ.get("HF_TOKEN"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"model: '{model}' is no folder here and cannot be had from the Hugging Face hub ({first}); "
            f"check the name, the network, or set HF_TOKEN for a gated model"
        ) from None
