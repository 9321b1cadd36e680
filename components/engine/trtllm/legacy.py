"""Builds engines with `trtllm-build`, as TensorRT-LLM up to 1.2.1 and 1.3.0rc20 does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trimtab.base import child, progress
from trimtab.base.errors import Failure
from trimtab.catalog.formats import STORAGES
from trimtab.catalog.kv_caches import BY_ALGORITHM
from trimtab.components.engine.trtllm import ranks
from trimtab.recipe import Engine
from trimtab.runtime.engines import backends
from trimtab.serving.settings import build_command
from trimtab.store.cache import cache_folder


def build(export: Path, output: Path, scratch: Path, settings: Engine, time_limit: float) -> None:
    """Fills a folder with an engine for each rank and their config.json.

    Args:
        output: the folder of the engines.
        scratch: the TensorRT-LLM checkpoint is made here; ranks that an earlier try finished are kept.
        time_limit: seconds that `trtllm-build` may take.

    Raises:
        Failure: `unsupported`, the model cannot be converted, or the build ended with an error; `does_not_fit`, it ran
            out of memory.
        StageError: it took longer than the time limit, or was killed while there was memory.
    """
    checkpoint = scratch / "checkpoint"
    document = ranks.convert(export, checkpoint, settings)
    if not shutil.which("trtllm-build"):
        raise Failure("unsupported", "engine.backend: trtllm-legacy needs `trtllm-build`, which is not on the PATH")
    cache, learned = _timing_cache(), scratch / "timing.cache"
    storage = STORAGES.get(document["quantization"]["quant_algo"])
    kv_cache = BY_ALGORITHM.get(document["quantization"]["kv_cache_quant_algo"])
    command = build_command(
        settings,
        str(checkpoint),
        str(output),
        fp8_weights=bool(storage) and (storage.numbers, storage.scale) == ("e4m3", "tensor"),
        fp8_kv_cache=bool(kv_cache) and kv_cache.numbers == "e4m3",
        known_timings=str(cache) if cache.exists() else None,
        learned_timings=str(learned),
    )
    progress.report("engine", "trtllm-build")
    log = scratch / "trtllm-build.log"
    done = child.run_limited(command, "trtllm-build", time_limit, log=log)
    _check(done.returncode, log.read_text(encoding="utf-8", errors="replace"))
    missing = [rank for rank in range(settings.world_size) if not (output / f"rank{rank}.engine").is_file()]
    if missing:
        raise Failure("unsupported", f"trtllm-build wrote no engine for rank {missing[0]}; see {log}")
    if learned.exists():  # other builds may read the cache meanwhile
        cache.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(learned, cache.with_suffix(f".{os.getpid()}"))
        cache.with_suffix(f".{os.getpid()}").replace(cache)
    shutil.rmtree(checkpoint)


def _check(code: int, log: str) -> None:
    if code == 0:
        return
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
    if "out of memory" in log.lower():
        raise Failure("does_not_fit", f"trtllm-build ran out of memory: {told}")
    raise Failure("unsupported", f"trtllm-build ended with exit code {code}: {told}")


def _timing_cache() -> Path:
    """Measured times of kernels hold for one TensorRT on one kind of GPU."""
    device = backends.device()
    capability = ".".join(map(str, device.compute_capability)) if device else "none"
    version = backends.versions().get("tensorrt", "unknown")
    return cache_folder() / "timing" / f"tensorrt-{version}-sm-{capability}.cache"
