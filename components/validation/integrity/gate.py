"""Is the export what the recipe asked for, and whole? Seconds, before an evaluation is paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab import families
from trimtab.base import progress
from trimtab.base.errors import Failure, InputError
from trimtab.components.validation.integrity import coverage, declaration, reload, weights
from trimtab.components.validation.integrity.folds import Folds
from trimtab.components.validation.integrity.reading import Stream
from trimtab.families import fusion
from trimtab.model.facts import inspect as read_facts
from trimtab.model.headers import read_tensors
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.model_files import weight_file_bytes
from trimtab.runtime.measure.measurements import Measurements


def inspect(
    export: str,
    checkpoint: str,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
    calibration: str | None = None,
) -> dict[str, Any]:
    """Compares the export with its recipe and its source, and writes `layers.json` and `reload.json`.

    In this order, so that what is found first explains the most: its files are whole; what they say of its
    quantization agrees; its KV cache and its layers are quantized as asked; no tensor is missing or superfluous;
    weights and scales are near the source's; its bytes are those that were planned with; it loads and writes text.

    Args:
        export: the exported checkpoint.
        checkpoint: what it was made from.
        parameters: the recipe's `quantize`, or {} for an export that is not quantized.
        calibration: what calibration measured of `checkpoint`, by which the errors are weighed; None judges them plain.

    Returns:
        quantized_share (bytes of the quantized tensors over their BF16 bytes), max_relative_error (of a layer),
        bytes (of the files), tensor_bytes and predicted_bytes, reload_skipped (why the export could not be run
        here, or "").

    Raises:
        Failure: `export_damaged`; names the layer, or else the file or setting, and what is wrong with it.
    """
    settings = Quantization.model_validate(parameters) if parameters else None
    folder, origin = Path(export), Path(checkpoint)
    facts = read_facts(origin)
    groups = fusion.groups([layer.name for layer in facts.linears], facts.model_type)
    _check_files(folder)
    declaration.check(folder, origin, settings)
    read, source = Stream(folder), Stream(origin)
    coverage.check_kv_cache(settings.kv_cache if settings else "none", read, facts)
    coverage.check_layers(read, facts, groups, settings)
    coverage.check_tensors(read, source, facts)
    made = settings is not None or not folder.samefile(origin)
    measured = Measurements(Path(calibration), origin, "calibration") if calibration else None
    family = families.named(facts.model_type)
    folds = Folds(read, source, groups, settings, facts)
    layers = weights.compare(read, source, family, groups, settings, folds, measured) if made else []
    found, predicted = coverage.check_bytes(read, facts, groups, settings)
    progress.report("validate", f"tensors take {found:,} bytes, {predicted:,} were predicted")
    loaded = reload.check(folder, origin) if made else {"skipped": None, "outputs": {}}
    for name, document in (("layers.json", layers), ("reload.json", loaded)):
        (Path(output) / name).write_text(json.dumps(document), encoding="utf-8")
    plain = sum(layer["bf16_bytes"] for layer in layers)
    return {
        "quantized_share": sum(layer["bytes"] for layer in layers) / plain if plain else 1.0,
        "max_relative_error": max((layer["relative_error"] for layer in layers), default=0.0),
        "bytes": weight_file_bytes(folder),
        "tensor_bytes": found,
        "predicted_bytes": predicted,
        "reload_skipped": loaded["skipped"] or "",
    }


def _check_files(folder: Path) -> None:
    """The remedies of a damaged source, such as to download it again, are none for an export."""
    try:
        read_tensors(folder)
    except InputError as error:
        reason = str(error).rpartition(";")[0] or str(error)
        raise Failure("export_damaged", reason.removeprefix(f"{folder}/").removeprefix(f"{folder}: ")) from None
