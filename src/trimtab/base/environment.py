"""Where something was computed: the versions of the libraries, and the device, read without importing any of them.

The client and the small tasks between the stages have no torch, and a stage that has nothing to do imports none.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

#: What makes and measures an artifact, by the names of the packages.
LIBRARIES = ("trimtab", "torch", "transformers", "nvidia-modelopt", "lm-eval", "tensorrt_llm", "tensorrt", "vllm")

#: CUDA's driver: the only library that every container with a GPU has, and that sees the devices as a process does
#: (CUDA_VISIBLE_DEVICES, MIG). `nvidia-smi` sees others, and is missing where only `compute` is granted.
#: https://docs.nvidia.com/cuda/cuda-driver-api
_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those of the packages that this image has."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def versions() -> dict[str, str]:
    """Returns the versions of what makes and measures an artifact here, Python's included."""
    return {"python": platform.python_version(), **installed(LIBRARIES)}


def commit() -> str | None:
    """Returns the commit that this trimtab was installed from: TRIMTAB_COMMIT, which an image sets, or what pip wrote
    down of a repository; None where neither says so."""
    if (told := os.environ.get("TRIMTAB_COMMIT", "unknown")) != "unknown":  # as an image has it that nobody told
        return told or None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        about = json.loads(importlib.metadata.distribution("trimtab").read_text("direct_url.json") or "{}")
        return about.get("vcs_info", {}).get("commit_id")
    return None


def device() -> dict[str, Any]:
    """Returns what a model is computed on here: {"gpu", "compute_capability"} of the first GPU that this process sees,
    else {"processor", "threads"}, with as many threads as it may use.

    A PyTorch that was built for processors alone ("2.13.0+cpu") uses no GPU, whatever there is.
    """
    found = None if installed(["torch"]).get("torch", "").endswith("+cpu") else _gpu()
    return found or {"processor": _processor(), "threads": _threads()}


def has_gpu() -> bool:
    """Whether NVIDIA's driver is here, and lets this process at a GPU; starts nothing."""
    return Path("/dev/nvidiactl").exists()


@cache
def gpus() -> int:
    """Returns how many GPUs this process sees; asks CUDA's driver, as `device` does."""
    count, cuda = ctypes.c_int(), _cuda()
    if cuda:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    return count.value


@cache
def _gpu() -> dict[str, Any] | None:
    """Asks CUDA's driver for its first device; makes no context on it and takes no memory of it."""
    cuda, handle, name = _cuda(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if not cuda or cuda.cuDeviceGet(ctypes.byref(handle), 0) or cuda.cuDeviceGetName(name, 256, handle):
        return None
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(str(value.value))
    return {"gpu": name.value.decode(), "compute_capability": ".".join(capability)}


def _cuda() -> ctypes.CDLL | None:
    """CUDA's driver, ready to be asked; None where there is none, or it does not start."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    return None if cuda.cuInit(0) else cuda


def has_started_gpus() -> bool:
    """Whether this process has started CUDA's driver: who has not is told so, whatever else it asks."""
    not_initialized = 3
    try:
        cuda = ctypes.CDLL(_DRIVER, mode=os.RTLD_NOLOAD)
    except OSError:  # nothing has loaded it
        return False
    return cuda.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != not_initialized


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _threads() -> int:
    """The threads that libraries use: as many as OpenMP is told, or processors that this process may run on."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told):
        return int(told)
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's limit, "200000 100000" or "max 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        own = min(own, math.ceil(int(quota) / int(period)))
    return own
