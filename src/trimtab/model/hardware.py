"""The targets: what each device has, and what each back end runs there, from the rows of `trimtab.catalog`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from trimtab.base import environment
from trimtab.base.errors import InputError, nearest
from trimtab.base.schema import Document
from trimtab.catalog.backends import BACKENDS, EMULATING, TENSORRT_LLM
from trimtab.catalog.formats import FORMATS, WeightFormat
from trimtab.catalog.kv_caches import KV_CACHES, KVCacheFormat
from trimtab.catalog.targets import TARGETS as ROWS
from trimtab.recipe import Recipe

GB = 10**9
#: back end of TensorRT-LLM -> what it serves on any GPU.
TENSORRT_LLM_FORMATS = {
    name: tuple(row.name for row in FORMATS.values() if name in row.served) for name in TENSORRT_LLM
}
TENSORRT_LLM_KV_CACHES = {
    name: tuple(row.name for row in KV_CACHES.values() if name in row.served) for name in TENSORRT_LLM
}
_ON_CPU = tuple(name for name, row in BACKENDS.items() if row.cpu)
_EMULATED_KV_CACHES = {
    name: tuple(form for form, row in KV_CACHES.items() if row.numbers and name not in row.served) for name in EMULATING
}


class Hardware(Document):
    """One device of a target.

    `memory_bytes` is what the device has; `bandwidth` in bytes/s, None where it is not known (cpu);
    `compute_capability` None means that it is no CUDA device. `formats` and `kv_caches` say for each back end
    what runs natively there; `emulated` says what runs only by dequantising: slow, but it judges accuracy.
    `emulated_kv_caches` says the same of KV caches, which then take 16 bits. `devices` is how many there are; None
    where that is not known: as many as a server has.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    compute_capability: tuple[int, int] | None = None
    formats: dict[str, tuple[str, ...]]
    kv_caches: dict[str, tuple[str, ...]]
    emulated: dict[str, tuple[str, ...]] = {}
    emulated_kv_caches: dict[str, tuple[str, ...]] = _EMULATED_KV_CACHES
    devices: int | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(self.formats)

    @property
    def default_backend(self) -> str:
        """TensorRT-LLM where it runs, else the embedded engine."""
        return "trtllm" if "trtllm" in self.formats else "torch"

    def is_emulated(self, recipe: Recipe) -> bool:
        """Whether the recipe's format is judged by emulation on this target."""
        return recipe.weight_format in self.emulated.get(recipe.engine.backend, ())

    def is_kv_cache_emulated(self, recipe: Recipe) -> bool:
        """Whether the recipe's KV cache is judged by emulation on this target."""
        return recipe.kv_cache_format in self.emulated_kv_caches.get(recipe.engine.backend, ())


def gpu(name: str, memory_gb: int, bandwidth_gb: float, capability: tuple[int, int]) -> Hardware:
    """Returns a GPU of that memory in GB, bandwidth in GB/s and compute capability, which says what runs there."""

    def runs(rows: Mapping[str, WeightFormat | KVCacheFormat], backend: str) -> tuple[str, ...]:
        ranges = ((form, row.served[backend]) for form, row in rows.items() if backend in row.served)
        return tuple(form for form, (first, last) in ranges if first <= capability <= last)

    return Hardware(
        name=name,
        memory_bytes=memory_gb * GB,
        bandwidth=bandwidth_gb * GB,
        compute_capability=capability,
        formats={backend: runs(FORMATS, backend) for backend in BACKENDS},
        kv_caches={backend: ("none", *runs(KV_CACHES, backend)) for backend in BACKENDS},
        emulated={
            backend: tuple(form for form, row in FORMATS.items() if backend not in row.served) for backend in EMULATING
        },
    )


GPUS = {row.name: gpu(row.name, row.memory_gb, row.bandwidth_gb, row.compute_capability) for row in ROWS.values()}
TARGETS = (*GPUS, "cpu")
#: Words before a GPU's own name.
_VENDOR = ("nvidia", "tesla", "geforce")
#: Devices that are no target: none of them is a misspelt one, however alike the names are.
_OTHERS = ("a2", "a10", "a10g", "a16", "a30", "a40", "cuda", "gpu", "h20", "l20", "p100", "t4", "v100")


def target(name: str, memory_bytes: int | None = None) -> Hardware:
    """Returns the target of that name.

    Args:
        name: one of `TARGETS`.
        memory_bytes: overrides the memory of the device; for cpu the default is measured on this machine.

    Raises:
        InputError: no such target; names the nearest one.
    """
    if name == "cpu":
        return Hardware(
            name="cpu",
            memory_bytes=memory_bytes or machine_memory(),
            formats={
                name: tuple(form for form, row in FORMATS.items() if name in row.cpu) for name in _ON_CPU
            },
            kv_caches=dict.fromkeys(_ON_CPU, ("none",)),
            emulated={
                name: tuple(form for form, row in FORMATS.items() if name not in row.cpu) for name in EMULATING
            },
        )
    if name not in GPUS:
        raise InputError(f"target: '{name}' is not known; {_known_as(name)}")
    return GPUS[name].model_copy(update={"memory_bytes": memory_bytes} if memory_bytes else {})


def on_this_machine(found: Hardware) -> Hardware:
    """Returns a target with as many devices as this machine has of its kind; as it is where there are none."""
    kind, here = found.compute_capability, environment.device()
    if kind is None or here.get("compute_capability") != "{}.{}".format(*kind):
        return found
    return found.model_copy(update={"devices": environment.gpus()})


def _known_as(name: str) -> str:
    """Returns what to write for a GPU by another of its names, such as nvidia-smi's "NVIDIA A100-SXM4-80GB"."""
    words = [word for word in re.findall(r"[a-z0-9]+", name.casefold()) if word not in _VENDOR]
    sizes = [known for known in TARGETS if words and known.startswith(f"{words[0]}-")]
    if sizes and not any(re.match(size.partition("-")[2], word) for size in sizes for word in words[1:]):
        return "write " + " or ".join(f"'{size}'" for size in sizes)
    if words and words[0] in _OTHERS:
        return f"valid: {', '.join(TARGETS)}"
    return nearest(" ".join(words), TARGETS)


def machine_memory(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Returns the bytes of memory that this process may use: the machine's, or its container's when less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = cgroup.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical
