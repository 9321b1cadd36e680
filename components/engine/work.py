"""Builds an engine: for the torch back end a warm load and a smoke generation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trimtab import progress
from trimtab.errors import Failure
from trimtab.recipe import Engine

PROMPT = "The quick brown fox"


def build(export: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Loads the export in the recipe's engine, generates from it, and writes `engine.json`.

    `engine.json` names the back end, its settings, and for each layer the kernel that runs it.

    Returns:
        layers, emulated_layers (run in another precision than the export's), weight_bytes.

    Raises:
        Failure: `unsupported`, a back end that this image does not have; `export_damaged`, the export does not
            load or its outputs are not numbers.
    """
    from trimtab.runtime.backends import load_engine

    settings = Engine.model_validate(parameters)
    progress.report("engine", "warm load")
    engine = load_engine(Path(export), settings)
    prompt = engine.tokenizer(PROMPT, add_special_tokens=False).input_ids
    likelihood, _ = engine.loglikelihood([(prompt[:1], prompt[1:])])[0]
    if not math.isfinite(likelihood):
        raise Failure("export_damaged", f"the likelihood of '{PROMPT}' is {likelihood}")
    if not engine.generate([prompt], max_new_tokens=8)[0]:
        raise Failure("degenerate_output", f"the engine generates nothing after '{PROMPT}'")
    kernels = engine.kernels()
    document = {"settings": settings.model_dump(mode="json"), "kernels": kernels}
    (Path(output) / "engine.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return {
        "layers": len(kernels),
        "emulated_layers": sum(kernel["emulated"] for kernel in kernels.values()),
        "weight_bytes": engine.weight_bytes,
    }
