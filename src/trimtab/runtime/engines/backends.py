"""Opens a built engine in the back end that its recipe names, if this image has it."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import torch

from trimtab import recipe
from trimtab.base.errors import Failure
from trimtab.base.schema import digest
from trimtab.catalog.backends import BACKENDS
from trimtab.planning import installed
from trimtab.recipe import files
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.protocol import Engine
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.serving import record
from trimtab.serving.record import CHECKPOINT, RANKS, Device

__all__ = [
    "CHECKPOINT",
    "RANKS",
    "check",
    "check_built",
    "checkpoint_digest",
    "device",
    "open_engine",
    "versions",
]


def check(settings: recipe.Engine) -> None:
    """Refuses a back end that this image cannot serve with.

    Raises:
        Failure: `unsupported`; TensorRT-LLM or vLLM is not installed, or not in a version that has the back end.
    """
    if reason := installed.refusal(settings):
        raise Failure("unsupported", reason)


def open_engine(engine: Path, export: Path, kv_cache: ServedKVCache = "export") -> Engine:
    """Opens a built engine: its `engine.json` says how the export is loaded.

    Args:
        kv_cache: "export" for the KV cache that the export asks for, "none" for 16 bits whatever it asks for;
            only back ends that switch it (`catalog.backends`) can be asked for that.

    Raises:
        Failure: `unsupported`, a back end that this image does not have, or an engine that was built elsewhere;
            `export_damaged`, an export that does not load, or another one than the engine was built from.
    """
    built = check_built(engine, export)
    row = BACKENDS[built.settings.backend]
    if kv_cache != "export" and not row.switches_kv_cache:
        raise Failure("unsupported", f"{row.name} serves the KV cache that the export asks for alone")
    # A back end's library is not in every image, and takes seconds to import.
    return importlib.import_module(row.module).open_engine(built, Path(engine), export, kv_cache)


def check_built(engine: Path, export: Path) -> record.Built:
    """Returns what is written down of a built engine, after refusing one that cannot be opened here for this export.

    Raises:
        Failure: as `open_engine`.
    """
    built = record.read(engine)
    check(built.settings)
    built.check(checkpoint_digest(export), versions(), device())
    return built


def checkpoint_digest(export: Path) -> str:
    """Returns 64 hex digits that tell exports apart: their tensors' fingerprint, and how they say they are stored."""
    told = [Path(export) / name for name in ("config.json", "hf_quant_config.json")]
    return digest([Export(export).fingerprint, *(files.sha256(path) for path in told if path.is_file())])


def versions() -> dict[str, str]:
    """Returns the versions of what runs engines, by the names of their packages."""
    found = {}
    for package in ("torch", "tensorrt_llm", "tensorrt", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> Device | None:
    """Returns the first GPU, None where there is none."""
    if not torch.cuda.is_available():
        return None
    return Device(name=torch.cuda.get_device_name(), compute_capability=torch.cuda.get_device_capability())
