"""What is to be served: a release of a store, or the folder of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.catalog.formats import FORMATS
from trimtab.recipe import Engine, Recipe
from trimtab.serving.record import CHECKPOINT
from trimtab.store import open_store
from trimtab.store.address import split_release, split_tree

#: ModelOpt's quant_algo -> the formats of a recipe that it stores; None for those that only cast.
_FORMATS: dict[str | None, tuple[str, ...]] = {}
for _name, _row in FORMATS.items():
    _others, _own = _FORMATS.get(_row.algorithm, ()), _row.storage and _row.storage.modelopt == _name
    _FORMATS[_row.algorithm] = (_name, *_others) if _own else (*_others, _name)  # ModelOpt's own name stands for all


class Served(Document):
    """An artifact to serve: its name, how, and where servers find its checkpoint and, for `trtllm-legacy`, its engines.

    `trees` are those of a release, to be brought to these places; `goal` and `reason` are of its verdict.
    """

    name: str
    settings: Engine
    formats: tuple[str, ...]
    kv_cache: str = "none"
    model_path: str
    engine_path: str = ""
    trees: dict[str, str] = {}
    reason: str = ""


def find(artifact: str, recipe: Recipe | None = None, model_path: str = "", engine_path: str = "") -> Served:
    """Reads what an artifact is.

    Args:
        artifact: `<store>/releases/<name>/<version>`, or a folder with an exported checkpoint.
        recipe: its `engine` serves, in the place of that of the release.
        model_path: the checkpoint's folder on the server; the folder itself, of a release /models/<name>, if empty.
        engine_path: the folder of the serialized engines on the server; /engines/<name> if empty.

    Raises:
        InputError: neither of them, or an export that no server should be given.
    """
    release = split_release(artifact)
    served = _of_release(artifact, *release[:2]) if release else _of_folder(Path(artifact))
    places = {"model_path": model_path or served.model_path, "engine_path": engine_path or f"/engines/{served.name}"}
    settings = {"settings": recipe.engine} if recipe else {}
    return served.model_copy(update={**places, **settings})


def _of_release(uri: str, store: str, name: str) -> Served:
    record: dict[str, Any] = open_store(store).read_release(uri)
    recipe = Recipe.parse(record["recipe"])
    quantize, engine, path = recipe.quantize, record.get("engine"), f"/models/{name}"
    if recipe.engine.backend == "vllm" and engine and _is_translated(engine["uri"]):
        path = f"/engines/{name}/{CHECKPOINT}"  # what vLLM reads in place of the export
    return Served(
        name=name,
        settings=recipe.engine,
        formats=(quantize.format,) if quantize else ("bf16",),
        kv_cache=quantize.kv_cache if quantize else "none",
        model_path=path,
        trees={"export": record["artifact"]["uri"], **({"engine": engine["uri"]} if engine else {})},
        reason=record["verdict"].get("reason", ""),
    )


def _is_translated(engine: str) -> bool:
    """Whether a built engine of vLLM has the checkpoint beside it that it serves."""
    store = open_store(split_tree(engine)[0])
    return any(path.startswith(f"{CHECKPOINT}/") for path in store.manifest(engine).files)


def _of_folder(folder: Path) -> Served:
    """The guards are against what others ran into: see the issues of TensorRT-LLM that they name."""
    if not (folder / "config.json").is_file():
        raise InputError(f"artifact: '{folder}' is no export and no release; write a folder with config.json, or a URI")
    if ranks := sorted(folder.glob("rank*.safetensors")):  # TensorRT-LLM issues #6513 and #10739
        raise InputError(f"artifact: '{folder}' holds {ranks[0].name}, a checkpoint for trtllm-build; write the export")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        own = folder / "hf_quant_config.json"
        quantization = json.loads(own.read_bytes())["quantization"] if own.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"artifact: '{folder}' cannot be read ({error}); export it again") from None
    if "quantization_config" in config and not quantization:
        raise InputError(f"artifact: '{folder}' lacks hf_quant_config.json, which says its precision; copy it too")
    algorithm = quantization.get("quant_algo")
    if algorithm not in _FORMATS:
        known = ", ".join(filter(None, _FORMATS))
        raise InputError(f"artifact: '{folder}' is quantized with {algorithm}; known: {known}")
    path = folder.absolute()
    name = "".join(c if c.isalnum() else "-" for c in path.name.lower()).strip("-") or "model"
    kv_cache = (quantization.get("kv_cache_quant_algo") or "none").lower()
    settings, formats = Engine(backend="trtllm"), _FORMATS[algorithm]
    if mixed := {layer.get("quant_algo") for layer in (quantization.get("quantized_layers") or {}).values()}:
        formats = tuple(form for form in formats if mixed <= {part.algorithm for part in FORMATS[form].parts})
        if not formats:
            found = ", ".join(sorted(map(str, mixed)))
            raise InputError(f"artifact: '{folder}' mixes {found}, as no format of trimtab does; quantize it again")
    return Served(name=name, settings=settings, formats=formats, kv_cache=kv_cache, model_path=str(path))
