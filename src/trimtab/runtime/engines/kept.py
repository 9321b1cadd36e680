"""Engines that stay open in this process: an export is loaded once, whatever is asked of it and in which order.

Two stay beside each other while their weights take at most half of what the device has: the rest is for what they
compute, and speed is measured as it was alone. One that goes block by block holds nothing between two questions. Else,
and where a library claims the GPU for itself or an engine has several devices, the one that was used last is closed
before another is opened.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from trimtab import recipe
from trimtab.base import progress
from trimtab.catalog.backends import BACKENDS
from trimtab.model.hardware import machine_memory
from trimtab.runtime.checkpoint.model_files import Export, weight_file_bytes
from trimtab.runtime.engines import backends
from trimtab.runtime.engines.by_block import BlockwiseEngine
from trimtab.runtime.engines.protocol import Engine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.serving import record

#: What the weights of all open engines may take of the device's memory.
SHARE = 0.5

#: Which export, with which KV cache, and the folder of the engine that was built, or "": none was built for it.
_Key = tuple[str, str, str]

#: The last used comes last.
_open: dict[_Key, Engine] = {}


def built(engine: Path, export: Path, kv_cache: ServedKVCache = "export") -> Engine:
    """Returns the open engine of a built one, as `backends.open_engine` opens it. It is not to be closed.

    Raises:
        Failure: as `backends.open_engine`.
    """
    key = (_which(export), kv_cache, str(engine))
    if key in _open:
        _open[key] = _open.pop(key)
        return _open[key]
    settings = record.read(Path(engine)).settings
    alike = _alike(key)
    if alike and settings.backend == "torch" and settings.world_size == 1:
        backends.check_built(Path(engine), Path(export))
        _open[key] = alike.under(settings)
        return _open[key]
    _make_room(Path(export), settings)
    progress.report("validate", f"loading {export} into {BACKENDS[settings.backend].library or 'PyTorch'}")
    _open[key] = backends.open_engine(Path(engine), Path(export), kv_cache)
    return _open[key]


def loaded(export: Path, settings: recipe.Engine, kv_cache: ServedKVCache = "export") -> TorchEngine:
    """Returns the open embedded engine of an export that none was built for. It is not to be closed.

    Raises:
        InputError, Failure: as `TorchEngine`.
    """
    key = (_which(export), kv_cache, "")
    known = _open.pop(key, None) or _alike(key)
    if known:
        _open[key] = known.under(settings)
        return _open[key]
    _make_room(Path(export), settings)
    progress.report("validate", f"loading {export} into PyTorch")
    _open[key] = TorchEngine(Path(export), settings, kv_cache=kv_cache)
    return _open[key]


def is_open(engine: Path, export: Path) -> bool:
    """Whether `built` would return without loading."""
    key = (_which(export), "export", str(engine))
    return key in _open or _alike(key) is not None


def have_room(places: Sequence[tuple[Path, Path]]) -> bool:
    """Whether the built engines of these folders and exports stay open beside each other."""
    settings = [record.read(engine).settings for engine, _ in places]
    if any(BACKENDS[each.backend].claims_gpu or each.world_size > 1 for each in settings):
        return False
    open_now = {export: size for (export, _), size in _weights().items()}
    exports = {_which(export): export for _, export in places}
    needed = sum(open_now.get(which) or _bytes(export) for which, export in exports.items())
    return needed <= SHARE * _memory()


def could_hold(export: Path) -> bool:
    """Whether the device, or the machine where there is none, holds an export as the embedded engine loads it."""
    return _bytes(Path(export)) <= _memory()


def close() -> None:
    """Closes all engines."""
    for engine in _open.values():
        engine.close()
    _open.clear()
    _give_back()


def _which(export: Path) -> str:
    """What tells a folder's export from another that stood there before."""
    changed = max(path.stat().st_mtime_ns for path in Path(export).iterdir())
    return f"{export} {changed}"


def _alike(key: _Key) -> TorchEngine | None:
    """An embedded engine that has loaded the same export with the same KV cache, for other limits."""
    found = (engine for other, engine in _open.items() if other[:2] == key[:2])
    return next((engine for engine in found if isinstance(engine, TorchEngine)), None)


def _make_room(export: Path, settings: recipe.Engine) -> None:
    """Closes engines, the longest unused first, until another one has room beside the rest."""
    alone = BACKENDS[settings.backend].claims_gpu or settings.world_size > 1
    needed, most = 0 if settings.by_block else _bytes(export), SHARE * _memory()
    while _open and (alone or _claims_all() or needed + sum(_weights().values()) > most):
        first = next(iter(_open))[:2]
        for key in [key for key in _open if key[:2] == first]:  # they share what they have loaded
            _open.pop(key).close()
        _give_back()


def _claims_all() -> bool:
    return any(not isinstance(engine, (TorchEngine, BlockwiseEngine)) for engine in _open.values())


def _weights() -> dict[tuple[str, str], int]:
    return {key[:2]: engine.weight_bytes for key, engine in _open.items() if not isinstance(engine, BlockwiseEngine)}


def _bytes(export: Path) -> int:
    """What an export takes at most once it is loaded: a format that is emulated is held in 16 bits."""
    layouts = set(Export(export).layers.values())
    widest = max((16 / layout.bits for layout in layouts), default=1)
    return round(weight_file_bytes(export) * widest)


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return machine_memory()


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


atexit.register(close)
