"""Do the two files that say how an export is quantized say the same, and is its config otherwise the source's?

ModelOpt writes hf_quant_config.json, which TensorRT-LLM reads, and puts the same, in compressed-tensors' shape, into
config.json as `quantization_config`, which others read. Where that shape has no place for something (the group size
of INT4), nothing is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.base.errors import Failure
from trimtab.catalog import kv_caches
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.config_file import both_spellings
from trimtab.runtime.checkpoint.layer_layout import plain_dtype

OWN, CONFIG = "hf_quant_config.json", "config.json"
#: What an export's config may have otherwise than its source's.
_CHANGED = ("dtype", "torch_dtype", "quantization_config")


def check(export: Path, source: Path, settings: Quantization | None) -> None:
    """Compares what an export's files say of its quantization with each other, and its config with the source's.

    Args:
        export: the exported folder.
        source: the plain checkpoint it was made from.
        settings: the recipe's `quantize`, None for a model that was only pruned or trained.

    Raises:
        Failure: `export_damaged`; names the layer or the setting, and what each file says.
    """
    config, original = _read(export / CONFIG), both_spellings(_read(source / CONFIG))
    # What an export lacks in one spelling follows from the other; what it has must be right in each: readers differ.
    config = both_spellings(config) | config
    for key in sorted((config.keys() | original.keys()) - set(_CHANGED)):
        if config.get(key) != original.get(key):
            found = f"{config.get(key)!r}, its source's {original.get(key)!r}"
            raise Failure("export_damaged", f"{CONFIG}: {key} is {found}")
    if settings:
        wanted = str(plain_dtype(settings.format)).removeprefix("torch.")
        for key in ("dtype", "torch_dtype"):
            if config.get(key) != wanted:
                what = f"{key} is {config.get(key)!r}, {settings.format} has {wanted!r}"
                raise Failure("export_damaged", f"{CONFIG}: {what}")
    own, flat = _read(export / OWN).get("quantization"), config.get("quantization_config")
    if own is None and flat is None:
        if settings and not settings.row.is_cast:
            raise Failure("export_damaged", f"neither {OWN} nor {CONFIG} says how the export is quantized")
        return
    if own is None or flat is None:
        has, lacks = (CONFIG, OWN) if own is None else (OWN, CONFIG)
        raise Failure("export_damaged", f"{lacks} says nothing of the quantization that {has} describes")
    if flat.get("quant_method") != "modelopt":
        raise Failure("export_damaged", f"{CONFIG}: quant_method is {flat.get('quant_method')!r}, not 'modelopt'")
    _check_agree(own, flat)


def _check_agree(own: dict[str, Any], flat: dict[str, Any]) -> None:
    for what, ours, theirs in (
        ("quant_algo", own.get("quant_algo"), flat.get("quant_algo")),
        ("the excluded modules", sorted(own.get("exclude_modules") or []), sorted(flat.get("ignore") or [])),
        ("the KV cache", own.get("kv_cache_quant_algo"), _kv_cache(flat.get("kv_cache_scheme"))),
    ):
        if ours != theirs:
            raise _disagree(what, ours, theirs)
    table, other = own.get("quantized_layers") or {}, flat.get("quantized_layers") or {}
    for layer in sorted(table.keys() | other.keys()):
        if table.get(layer) != other.get(layer):
            raise _disagree(layer, table.get(layer), other.get(layer))
    for group in (flat.get("config_groups") or {}).values():
        size = group.get("weights", {}).get("group_size")
        for target in group.get("targets", []):
            expected = table.get(target, own).get("group_size")
            if size is not None and size != expected:
                what = "group_size" if target not in table else f"{target}: group_size"
                raise _disagree(what, expected, size)


def _kv_cache(scheme: Any) -> Any:
    """Returns ModelOpt's name of the KV cache: FP8 is written as a dictionary, every other one by its name."""
    return kv_caches.of_scheme(scheme) or scheme


def _disagree(what: str, own: Any, flat: Any) -> Failure:
    return Failure("export_damaged", f"{what}: {OWN} says {own!r}, {CONFIG} says {flat!r}")


def _read(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, {} where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise Failure("export_damaged", f"{path.name}: is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Failure("export_damaged", f"{path.name}: holds no JSON object")
    return document
