"""The machine that a benchmark runs on: what it is, what time and memory work takes there, and what it could do."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def versions() -> dict[str, str]:
    """The machine and the libraries that the figures depend on."""
    found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["card"] = torch.cuda.get_device_name() if CUDA else "none (CPU)"
    for package in ("transformers", "nvidia-modelopt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def log(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:300]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


@contextmanager
def peak(row: dict[str, Any], name: str) -> Iterator[None]:
    """Notes the GiB of GPU memory that the body took at most, beside what was held before it."""
    if not CUDA:
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    row[name] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def speed_limit(model: Any, batch: int, tokens: float) -> float:
    """Tokens a second if a step took as long as reading, once, what it must: the weights, and keys and values.

    The torch engine holds these in 16 bits. Of an embedding that is not the head too, a step reads a row.
    """
    from trimtab.runtime.paged import attention_layers, key_features

    embedding = model.get_input_embeddings().weight
    read = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if embedding is not model.get_output_embeddings().weight:
        read -= embedding.nbytes
    keys_and_values = sum(2 * 2 * key_features(model, module) for module in attention_layers(model))
    return batch * copy_bandwidth() / (read + batch * tokens * keys_and_values)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes, the best of several."""
    source = torch.zeros((2 << 30) if CUDA else (64 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(8))


def roomy(large: bool) -> str | None:
    """Memory is the fastest disk, if it has room for a model of 16 GB and its export."""
    memory = Path("/dev/shm")
    return str(memory) if large and memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30 else None
