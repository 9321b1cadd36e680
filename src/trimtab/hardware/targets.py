"""The targets as data: what each has, and what a back end runs there.

Memory and bandwidth are NVIDIA's datasheet figures, in decimal bytes: A100 PCIe (40 GB: 1,555 GB/s; 80 GB:
1,935 GB/s), L4 (24 GB, 300 GB/s), L40S (48 GB, 864 GB/s), H100 SXM (80 GB, 3.35 TB/s), H200 (141 GB,
4.8 TB/s), DGX B200 (1,440 GB and 64 TB/s over eight GPUs), GeForce RTX 4090 (24 GB, 1,008 GB/s).
Compute capabilities: developer.nvidia.com/cuda-gpus.

What a back end runs on which compute capability, and where that is said:

- `torch`: PyTorch's own kernels: `_scaled_mm` (FP8, 8.9 and later), `_int_mm`, on a CPU those of packed INT4 and
  INT8; on a GPU trimtab's for these (`runtime.matmul_kernel`), in bfloat16's instructions of 8.0 and later. The
  only back end for `mixed`: a MIXED_PRECISION checkpoint of INT4 and INT8 weights has no other reader, because
  TensorRT-LLM's matrix has no INT8 weights at all and vLLM reads no INT8 of ModelOpt.
- `trtllm`: the matrix of TensorRT-LLM's docs/source/features/quantization.md. Its NVFP4 KV cache is that of
  10.0 and 10.3; consumer Blackwell (12.0) has none (TensorRT-LLM issue #10241). Its KvCacheConfig has no INT8.
- `trtllm-legacy`: the support matrix of TensorRT-LLM 0.18 (INT8 and INT4 up to compute capability 9.0).
- `vllm`: FP8 from ModelOpt's unified checkpoint; INT4 once it is translated (`runtime.vllm_checkpoint`), which Marlin
  multiplies from Turing on, in BF16 from Ampere on. (vLLM also runs FP8 files on Ampere, as weight-only Marlin kernels.
  That is another computation than the one that was calibrated, so trimtab does not offer it.)

No prices: they differ by provider and day, so a ledger gets them from its user.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from trimtab.errors import InputError, nearest
from trimtab.recipe import CASTS, Format, KVCache, Recipe
from trimtab.schema import Document

GB = 10**9
BACKENDS = ("torch", "trtllm", "trtllm-legacy", "vllm")
#: Numbers along a row, or along a head of the KV cache, that share a scale in NVFP4.
NVFP4_BLOCK = 16
#: What the legacy back end converts: TensorRT-LLM has one module for both.
LEGACY_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

_ANY = ((8, 0), (99, 0))
_CUDA_CASTS = dict.fromkeys(CASTS, _ANY)
#: One layout, whichever way the numbers were found.
_INT4 = ("int4_rtn", "int4_awq", "int4_gptq")
#: back end -> format -> the compute capabilities, first and last, that run it.
_CUDA_FORMATS: dict[str, dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "torch": _CUDA_CASTS | {
        "int8_wo": _ANY, "int8_sq": _ANY, "fp8": ((8, 9), (99, 0)), "fp8_per_channel": ((8, 9), (99, 0)),
        **dict.fromkeys(_INT4, _ANY), "mixed": _ANY,
    },
    # sm120 (consumer Blackwell) has no W4A16 AWQ in the matrix, sm100 and sm103 do.
    "trtllm": _CUDA_CASTS | {
        "fp8": ((8, 9), (99, 0)), "fp8_per_channel": ((9, 0), (9, 0)),
        **dict.fromkeys(_INT4, ((8, 0), (10, 3))), "w4a8_awq": ((8, 9), (10, 3)),
        "nvfp4": ((10, 0), (99, 0)), "mxfp4": ((10, 0), (99, 0)),
    },
    "trtllm-legacy": _CUDA_CASTS | {
        "fp8": ((8, 9), (99, 0)), **dict.fromkeys((*_INT4, "int8_wo", "int8_sq"), ((8, 0), (9, 0))),
        "w4a8_awq": ((8, 9), (9, 0)),
    },
    "vllm": _CUDA_CASTS | {"fp8": ((8, 9), (99, 0)), **dict.fromkeys(_INT4, _ANY)},
}  # fmt: skip
#: back end -> format of the KV cache -> the compute capabilities, first and last, that serve it. TensorRT-LLM's
#: PyTorch back end serves FP8 on Ampere too.
CUDA_KV_CACHES: dict[str, dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "trtllm": {"fp8": ((8, 0), (99, 0)), "nvfp4": ((10, 0), (10, 3))},
    "trtllm-legacy": {"fp8": ((8, 9), (99, 0)), "int8": ((8, 0), (9, 0))},
    "vllm": {"fp8": ((8, 9), (99, 0))},
}
#: back end of TensorRT-LLM -> what it serves on any GPU.
TENSORRT_LLM_FORMATS = {name: tuple(_CUDA_FORMATS[name]) for name in ("trtllm", "trtllm-legacy")}
TENSORRT_LLM_KV_CACHES = {name: tuple(CUDA_KV_CACHES[name]) for name in TENSORRT_LLM_FORMATS}
#: `torch` rounds keys and values where attention reads them and stores them in 16 bits, on every device.
_EMULATED_KV_CACHES = {"torch": tuple(form for form in KVCache.__args__ if form != "none")}
#: Back ends that can run an export with its KV cache in 16 bits, so that it can be judged apart from the weights.
SWITCHES_KV_CACHE = ("torch",)
_CPU_FORMATS = (*CASTS, "int8_wo", "int8_sq", "int4_rtn", "int4_awq", "int4_gptq", "mixed")
#: Formats that no kernel of PyTorch multiplies on any device, or none on a CPU: judged by emulation.
_CUDA_EMULATED = {"torch": ("w4a8_awq", "nvfp4", "mxfp4")}
_CPU_EMULATED = {"torch": tuple(form for form in Format.__args__ if form not in _CPU_FORMATS)}
#: The block of a row that a format fixes.
FIXED_BLOCKS = {"nvfp4": NVFP4_BLOCK, "mxfp4": 32}
#: TensorRT-LLM's fine-grained INT4 kernels know two group sizes; PyTorch's and vLLM's know all three.
GROUP_SIZES = {"torch": (128, 64, 32), "trtllm": (128, 64), "trtllm-legacy": (128, 64), "vllm": (128, 64, 32)}


class Hardware(Document):
    """One device of a target.

    `memory_bytes` is what the device has; `bandwidth` in bytes/s, None where it is not known (cpu);
    `compute_capability` None means that it is no CUDA device. `formats` and `kv_caches` say for each back end
    what runs natively there; `emulated` says what runs only by dequantising: slow, but it judges accuracy.
    `emulated_kv_caches` says the same of KV caches, which then take 16 bits.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    compute_capability: tuple[int, int] | None = None
    formats: dict[str, tuple[str, ...]]
    kv_caches: dict[str, tuple[str, ...]]
    emulated: dict[str, tuple[str, ...]] = {}
    emulated_kv_caches: dict[str, tuple[str, ...]] = _EMULATED_KV_CACHES

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

    def runs(table: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> tuple[str, ...]:
        return tuple(form for form, (first, last) in table.items() if first <= capability <= last)

    formats = {backend: runs(table) for backend, table in _CUDA_FORMATS.items()}
    kv_caches = {backend: ("none", *runs(CUDA_KV_CACHES.get(backend, {}))) for backend in formats}
    return Hardware(
        name=name,
        memory_bytes=memory_gb * GB,
        bandwidth=bandwidth_gb * GB,
        compute_capability=capability,
        formats=formats,
        kv_caches=kv_caches,
        emulated=_CUDA_EMULATED,
    )


GPUS = {
    made.name: made
    for made in (
        gpu("a100-40", 40, 1555, (8, 0)),
        gpu("a100-80", 80, 1935, (8, 0)),
        gpu("l4", 24, 300, (8, 9)),
        gpu("l40s", 48, 864, (8, 9)),
        gpu("h100", 80, 3350, (9, 0)),
        gpu("h200", 141, 4800, (9, 0)),
        gpu("b200", 180, 8000, (10, 0)),
        gpu("rtx4090", 24, 1008, (8, 9)),
    )
}
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
            formats={"torch": _CPU_FORMATS},
            kv_caches={"torch": ("none",)},
            emulated=_CPU_EMULATED,
        )
    if name not in GPUS:
        raise InputError(f"target: '{name}' is not known; {_known_as(name)}")
    return GPUS[name].model_copy(update={"memory_bytes": memory_bytes} if memory_bytes else {})


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
