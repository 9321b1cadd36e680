"""What is known of a model before it is fetched, for planning: its weights stay where they are."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from trimtab.base.child import call
from trimtab.base.errors import InputError
from trimtab.components.fetch import source
from trimtab.model.facts import ModelFacts
from trimtab.model.outline import outline
from trimtab.store import open_store
from trimtab.store.address import canonical, split_tree
from trimtab.store.s3 import S3Back


def facts(model: str) -> ModelFacts:
    """Returns the facts of whatever `fetch` takes, or of a model's config.json alone.

    Of a folder and of a tree in the store all is known. Of the others the config alone is read, and the rest follows
    from it, as if each weight had 16 bits.

    Raises:
        InputError: there is no such model, it is damaged, or no family describes it.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        return outline(path)
    if path.is_dir() and [file.name for file in path.iterdir()] == ["config.json"]:
        return outline(path / "config.json")
    if path.is_dir():
        return source.facts(source.check(model))
    if (tree := split_tree(model)) and not path.exists():
        return ModelFacts.model_validate(open_store(tree[0]).manifest(model).metadata["facts"])
    model = source.check(model)
    with tempfile.TemporaryDirectory(prefix="trimtab-config-") as folder:
        config = Path(folder) / "config.json"
        if model.startswith("s3://"):
            config.write_bytes(_config_in_s3(model))
        elif path.exists():
            found = call("trimtab.components.fetch.gguf_config:read", path=str(path)).value
            config.write_text(json.dumps(found), encoding="utf-8")
        else:
            config.write_bytes(_config_on_hub(model))
        try:
            return outline(config)
        except InputError as error:
            raise InputError(f"model: '{model}': {str(error).removeprefix(f'{config}: ')}") from None


def _config_in_s3(model: str) -> bytes:
    bucket, _, prefix = canonical(model).removeprefix("s3://").partition("/")
    found = S3Back(bucket, prefix).read("config.json")
    if found is None:
        raise InputError(f"model: '{model}' has no config.json; write the prefix that holds the model's files")
    return found


def _config_on_hub(model: str) -> bytes:
    from huggingface_hub import hf_hub_download

    with source.from_hub(model, "its config"):
        return Path(hf_hub_download(model, "config.json", token=os.environ.get("HF_TOKEN"))).read_bytes()
