"""Opens an export in the engine that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab import recipe
from trimtab.errors import Failure
from trimtab.runtime.engine import Engine, TorchEngine
from trimtab.runtime.kv_cache import ServedKVCache


def load_engine(export: Path, settings: recipe.Engine, kv_cache: ServedKVCache = "export") -> Engine:
    """Loads an exported checkpoint.

    Args:
        kv_cache: "export" for the KV cache that the export asks for, "none" for 16 bits whatever it asks for;
            only back ends of `hardware.SWITCHES_KV_CACHE` can be asked for that.

    Raises:
        Failure: `unsupported`, a back end that is not part of this image.
    """
    if settings.backend != "torch":
        raise Failure(
            "unsupported", f"engine.backend: '{settings.backend}' is not part of this image; write 'torch'"
        )
    return TorchEngine(export, settings, kv_cache=kv_cache)


def open_engine(engine: Path, export: Path, kv_cache: ServedKVCache = "export") -> Engine:
    """Opens a built engine: its `engine.json` says how the export is loaded; `kv_cache` as in `load_engine`."""
    document = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    return load_engine(export, recipe.Engine.model_validate(document["settings"]), kv_cache)
