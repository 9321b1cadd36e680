"""Opens an export in the engine that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab import recipe
from trimtab.errors import Failure
from trimtab.runtime.engine import Engine, TorchEngine


def load_engine(export: Path, settings: recipe.Engine) -> Engine:
    """Loads an exported checkpoint.

    Raises:
        Failure: `unsupported`, a back end that is not part of this image.
    """
    if settings.backend != "torch":
        raise Failure(
            "unsupported", f"engine.backend: '{settings.backend}' is not part of this image; write 'torch'"
        )
    return TorchEngine(export, settings)


def open_engine(engine: Path, export: Path) -> Engine:
    """Opens a built engine: its `engine.json` says how the export is loaded."""
    document = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    return load_engine(export, recipe.Engine.model_validate(document["settings"]))
