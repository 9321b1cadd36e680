"""The targets as data, and why a target cannot run a recipe: asked before any accelerator is.

Memory and bandwidth are NVIDIA's datasheet figures, in decimal bytes: A100 PCIe (40 GB: 1,555 GB/s; 80 GB:
1,935 GB/s), L4 (24 GB, 300 GB/s), L40S (48 GB, 864 GB/s), H100 SXM (80 GB, 3.35 TB/s), H200 (141 GB,
4.8 TB/s), DGX B200 (1,440 GB and 64 TB/s over eight GPUs), GeForce RTX 4090 (24 GB, 1,008 GB/s).
Compute capabilities: developer.nvidia.com/cuda-gpus.

What a back end runs on which compute capability, and where that is said:

- `torch`: PyTorch's own kernels: `_scaled_mm` (FP8, 8.9 and later), `_int_mm`, `_weight_int4pack_mm`; on a GPU INT8
  weights are kept in INT8 and multiplied in bfloat16, which is faster than `_weight_int8pack_mm` there. The only
  back end for `int4_rtn`, which others could read and nobody should want beside AWQ, and for `mixed`: a
  MIXED_PRECISION checkpoint of INT4 and INT8 weights has no other reader, because TensorRT-LLM's matrix has no INT8
  weights at all and vLLM reads no INT8 of ModelOpt.
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
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from trimtab import shapes
from trimtab.errors import InputError, nearest
from trimtab.fusion import groups
from trimtab.model import Linear, ModelFacts
from trimtab.recipe import CASTS, GROUPED_FORMATS, Format, KVCache, Quantization, Recipe
from trimtab.schema import Document
from trimtab.serving import vllm

GB = 10**9
BACKENDS = ("torch", "trtllm", "trtllm-legacy", "vllm")
#: Numbers along a row, or along a head of the KV cache, that share a scale in NVFP4.
NVFP4_BLOCK = 16
#: What the legacy back end converts: TensorRT-LLM has one module for both.
LEGACY_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
#: Layers that tensor parallelism splits along their input, by the last part of their name (Llama's names).
ROW_PARALLEL = ("o_proj", "down_proj")
#: And along their output.
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

_ANY = ((8, 0), (99, 0))
_CUDA_CASTS = dict.fromkeys(CASTS, _ANY)
#: back end -> format -> the compute capabilities, first and last, that run it.
_CUDA_FORMATS: dict[str, dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "torch": _CUDA_CASTS | {
        "int8_wo": _ANY, "int8_sq": _ANY, "fp8": ((8, 9), (99, 0)), "fp8_per_channel": ((8, 9), (99, 0)),
        "int4_rtn": _ANY, "int4_awq": _ANY, "int4_gptq": _ANY, "mixed": _ANY,
    },
    # INT4 AWQ and GPTQ are one layout. sm120 (consumer Blackwell) has no W4A16 AWQ in the matrix, sm100 and sm103 do.
    "trtllm": _CUDA_CASTS | {
        "fp8": ((8, 9), (99, 0)), "fp8_per_channel": ((9, 0), (9, 0)), "int4_awq": ((8, 0), (10, 3)),
        "int4_gptq": ((8, 0), (10, 3)), "w4a8_awq": ((8, 9), (10, 3)),
        "nvfp4": ((10, 0), (99, 0)), "mxfp4": ((10, 0), (99, 0)),
    },
    "trtllm-legacy": _CUDA_CASTS | {
        "fp8": ((8, 9), (99, 0)), "int4_awq": ((8, 0), (9, 0)), "int4_gptq": ((8, 0), (9, 0)),
        "int8_wo": ((8, 0), (9, 0)), "int8_sq": ((8, 0), (9, 0)), "w4a8_awq": ((8, 9), (9, 0)),
    },
    "vllm": _CUDA_CASTS | {"fp8": ((8, 9), (99, 0)), "int4_awq": _ANY, "int4_gptq": _ANY},
}  # fmt: skip
#: back end -> format of the KV cache -> the compute capabilities, first and last, that serve it. TensorRT-LLM's
#: PyTorch back end serves FP8 on Ampere too.
_CUDA_KV_CACHES: dict[str, dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "trtllm": {"fp8": ((8, 0), (99, 0)), "nvfp4": ((10, 0), (10, 3))},
    "trtllm-legacy": {"fp8": ((8, 9), (99, 0)), "int8": ((8, 0), (9, 0))},
    "vllm": {"fp8": ((8, 9), (99, 0))},
}
#: back end of TensorRT-LLM -> what it serves on any GPU.
TENSORRT_LLM_FORMATS = {name: tuple(_CUDA_FORMATS[name]) for name in ("trtllm", "trtllm-legacy")}
TENSORRT_LLM_KV_CACHES = {name: tuple(_CUDA_KV_CACHES[name]) for name in TENSORRT_LLM_FORMATS}
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
_BACKEND_GROUP_SIZES = {"torch": (128, 64, 32), "trtllm": (128, 64), "trtllm-legacy": (128, 64), "vllm": (128, 64, 32)}


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
        return _format(recipe) in self.emulated.get(recipe.engine.backend, ())

    def is_kv_cache_emulated(self, recipe: Recipe) -> bool:
        """Whether the recipe's KV cache is judged by emulation on this target."""
        return _kv_cache(recipe) in self.emulated_kv_caches.get(recipe.engine.backend, ())


def _gpu(name: str, memory_gb: int, bandwidth_gb: float, capability: tuple[int, int]) -> Hardware:
    def runs(table: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> tuple[str, ...]:
        return tuple(form for form, (first, last) in table.items() if first <= capability <= last)

    formats = {backend: runs(table) for backend, table in _CUDA_FORMATS.items()}
    kv_caches = {backend: ("none", *runs(_CUDA_KV_CACHES.get(backend, {}))) for backend in formats}
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
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 40, 1555, (8, 0)),
        _gpu("a100-80", 80, 1935, (8, 0)),
        _gpu("l4", 24, 300, (8, 9)),
        _gpu("l40s", 48, 864, (8, 9)),
        _gpu("h100", 80, 3350, (9, 0)),
        _gpu("h200", 141, 4800, (9, 0)),
        _gpu("b200", 180, 8000, (10, 0)),
        _gpu("rtx4090", 24, 1008, (8, 9)),
    )
}
TARGETS = (*GPUS, "cpu")


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
        variants = " or ".join(f"'{known}'" for known in TARGETS if name and known.startswith(f"{name}-"))
        remedy = f"write {variants}" if variants else nearest(name, TARGETS)
        raise InputError(f"target: '{name}' is not known; {remedy}")
    return GPUS[name].model_copy(update={"memory_bytes": memory_bytes} if memory_bytes else {})


def machine_memory(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Returns the bytes of memory that this process may use: the machine's, or its container's when less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = cgroup.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def check(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    """Returns why the target cannot run the recipe on this model, in one sentence, or None when it can.

    Memory is not looked at here: `trimtab.memory` does that.
    """
    if reason := (
        _check_backend(recipe, hardware) or _check_format(recipe, hardware) or shapes.check(facts, recipe.prune)
    ):
        return reason
    facts = shapes.pruned(facts, recipe.prune)
    return (
        _check_kv_cache(recipe, hardware, facts)
        or _check_architecture(recipe, facts)
        or _check_exclusions(recipe, facts)
        or _check_stages(recipe, facts)
        or _check_parallelism(recipe, facts)
        or (check_packing(recipe.quantize, facts) if recipe.quantize else None)
        or _check_group_size(recipe, hardware, facts)
        or _check_blocks(recipe, facts)
    )


def _format(recipe: Recipe) -> str:
    return recipe.quantize.format if recipe.quantize else "bf16"


def _kv_cache(recipe: Recipe) -> str:
    return recipe.quantize.kv_cache if recipe.quantize else "none"


def _check_backend(recipe: Recipe, hardware: Hardware) -> str | None:
    backend = recipe.engine.backend
    if backend not in hardware.formats:
        remedy = nearest(backend, hardware.backends)
        return f"engine.backend: '{backend}' does not run on {hardware.name}; {remedy}"
    return vllm.check(recipe.engine) if backend == "vllm" else None


def _check_format(recipe: Recipe, hardware: Hardware) -> str | None:
    backend, name = recipe.engine.backend, _format(recipe)
    native = hardware.formats[backend]
    if name not in native and not hardware.is_emulated(recipe):
        served = ", ".join(native)
        if name.startswith("fp8") and hardware.compute_capability and hardware.compute_capability < (8, 9):
            major, minor = hardware.compute_capability
            return (
                f"quantize.format: {name} needs compute capability 8.9 or later (Ada, Hopper, Blackwell) and "
                f"{hardware.name} has {major}.{minor}; write one of: {served}"
            )
        elsewhere = [other for other in hardware.backends if name in hardware.formats[other]]
        hint = f", or engine.backend: {elsewhere[0]}" if elsewhere else ""
        return (
            f"quantize.format: {backend} does not serve {name} on {hardware.name}; "
            f"write one of: {served}{hint}"
        )
    return None


def _check_architecture(recipe: Recipe, facts: ModelFacts) -> str | None:
    if recipe.engine.backend == "trtllm-legacy" and facts.architecture not in LEGACY_ARCHITECTURES:
        known = " and ".join(LEGACY_ARCHITECTURES)
        return f"engine.backend: trtllm-legacy builds {known} alone, no {facts.architecture}; write 'trtllm'"
    return None


def _check_kv_cache(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    backend, kv_cache = recipe.engine.backend, _kv_cache(recipe)
    served = hardware.kv_caches[backend]
    if kv_cache not in served and not hardware.is_kv_cache_emulated(recipe):
        remedy = f"write one of: {', '.join(served)}" if len(served) > 1 else "write 'none'"
        elsewhere = [other for other in hardware.backends if kv_cache in hardware.kv_caches[other]]
        hint = f", or engine.backend: {elsewhere[0]}" if elsewhere else ""
        needed = _CUDA_KV_CACHES.get(backend, {}).get(kv_cache)
        if needed and hardware.compute_capability:
            (major, minor), (low, high) = hardware.compute_capability, needed
            return (
                f"quantize.kv_cache: {backend} serves {kv_cache} on compute capability {_range(low, high)} and "
                f"{hardware.name} has {major}.{minor}; {remedy}{hint}"
            )
        return f"quantize.kv_cache: {backend} serves no {kv_cache} KV cache on {hardware.name}; {remedy}{hint}"
    # TensorRT-LLM issue #1113: this pair asserts in the engine build.
    if backend == "trtllm-legacy" and _format(recipe) == "int8_wo" and kv_cache == "fp8":
        return "quantize.kv_cache: trtllm-legacy cannot build int8_wo with an fp8 KV cache; write 'none'"
    # vLLM refuses a ModelOpt checkpoint that names no format of weights ("Missing 'quant_algo'").
    if backend == "vllm" and kv_cache != "none" and _format(recipe) in CASTS:
        return f"quantize.kv_cache: vllm reads {kv_cache} beside quantized weights alone; write 'none', or format: fp8"
    if kv_cache == "nvfp4" and facts.head_dim % NVFP4_BLOCK:
        return (
            f"quantize.kv_cache: nvfp4 has a scale for each {NVFP4_BLOCK} numbers of a head, which do not divide "
            f"this model's {facts.head_dim}; write 'fp8'"
        )
    return None


def _range(first: tuple[int, int], last: tuple[int, int]) -> str:
    start = ".".join(map(str, first))
    return f"{start} or later" if last[0] == 99 else f"{start} to {'.'.join(map(str, last))}"


def _check_exclusions(recipe: Recipe, facts: ModelFacts) -> str | None:
    quantize = recipe.quantize
    if quantize is None or quantize.format in CASTS:
        return None
    names = [layer.name for layer in facts.linears]
    endings = [*sorted({f"*.{name.rpartition('.')[2]}" for name in names}), "lm_head"]
    for pattern in quantize.exclude:
        if not any(fnmatchcase(name, pattern) for name in (*names, "lm_head")):
            remedy = nearest(pattern, [*endings, *names], listed=endings)
            return f"quantize.exclude: '{pattern}' matches no layer; {remedy}"
    layers = quantized_layers(facts, quantize)
    if not layers:
        return "quantize.exclude: leaves no layer to quantize; remove a pattern, or write format: bf16"
    if not quantize.exclude_sensitive:  # a plan asks thousands of times, and grouping layers takes longest
        return None
    left = len(groups([layer.name for layer in layers], facts.model_type))
    if 0 < left <= quantize.exclude_sensitive:
        return (
            f"quantize.exclude_sensitive: {quantize.exclude_sensitive} of {left} groups of layers leave nothing to "
            f"quantize; write at most {left - 1}"
        )
    return None


def _check_stages(recipe: Recipe, facts: ModelFacts) -> str | None:
    stages, blocks = recipe.engine.pipeline_parallel_size, facts.layers
    if stages > blocks:
        return f"engine.pipeline_parallel_size: {stages} stages for {blocks} blocks; write at most {blocks}"
    if blocks % stages:
        good = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
        return f"engine.pipeline_parallel_size: {stages} does not divide {blocks} blocks; write one of: {good}"
    return None


def _check_parallelism(recipe: Recipe, facts: ModelFacts) -> str | None:
    engine, ranks = recipe.engine, recipe.engine.tensor_parallel_size
    if engine.backend == "torch" and ranks > 1:
        for layer in facts.linears:
            if layer.name.rpartition(".")[2] not in COLUMN_PARALLEL + ROW_PARALLEL:
                return f"engine.tensor_parallel_size: torch has no way to split {layer.name}; write 1"
    good = [size for size in range(1, facts.heads + 1) if splits(facts, size)]
    if ranks not in good:
        return (
            f"engine.tensor_parallel_size: {ranks} does not divide {facts.heads} attention heads and "
            f"{facts.kv_heads} KV heads; write one of: {', '.join(map(str, good))}"
        )
    return None


def splits(facts: ModelFacts, ranks: int) -> bool:
    """Whether tensor parallelism over so many ranks gives each whole heads and the same share of the MLP."""
    # More ranks than KV heads is served by copying heads, so either may divide the other.
    whole_kv = facts.kv_heads % ranks == 0 or ranks % facts.kv_heads == 0
    return facts.heads % ranks == 0 and whole_kv and facts.intermediate_size % ranks == 0


def check_packing(quantize: Quantization, facts: ModelFacts) -> str | None:
    """Returns why a format cannot store a layer of this model, whatever the target, or None when it can.

    The group sizes of INT4 depend on the target besides: `check` looks at them.
    """
    form, block = quantize.format, FIXED_BLOCKS.get(quantize.format, 1)
    for layer in quantized_layers(facts, quantize):
        keep = f"add '{layer.name}' to quantize.exclude"
        if layer.in_features % block:
            return (
                f"quantize.format: {form} has a scale for each {block} weights of a row, which do not divide the "
                f"{layer.in_features} of {layer.name}; {keep}"
            )
        if form in GROUPED_FORMATS and layer.out_features % 2:
            return (
                f"quantize.format: {form} stores output features in pairs, and {layer.name} has "
                f"{layer.out_features}; {keep}"
            )
    return None


def _check_group_size(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    quantize, backend = recipe.quantize, recipe.engine.backend
    if quantize is None or quantize.format not in GROUPED_FORMATS:
        return None
    served = _BACKEND_GROUP_SIZES[backend]
    if quantize.group_size not in served:
        sizes = ", ".join(map(str, served))
        return f"quantize.group_size: {backend} has no groups of {quantize.group_size}; write one of: {sizes}"
    for layer in quantized_layers(facts, quantize):
        features = _features_per_rank(layer, recipe.engine.tensor_parallel_size)
        if features % quantize.group_size:
            divide = [str(size) for size in served if features % size == 0]
            keep = f"add '{layer.name}' to quantize.exclude"
            return (
                f"quantize.group_size: {quantize.group_size} does not divide the {features} input features "
                f"of {layer.name}; {'write one of: ' + ', '.join(divide) if divide else keep}"
            )
    return None


def _check_blocks(recipe: Recipe, facts: ModelFacts) -> str | None:
    """A rank holds whole blocks of a row in formats that have their own."""
    quantize, ranks = recipe.quantize, recipe.engine.tensor_parallel_size
    if quantize is None or quantize.format not in FIXED_BLOCKS:
        return None
    for layer in quantized_layers(facts, quantize):
        if (features := _features_per_rank(layer, ranks)) % FIXED_BLOCKS[quantize.format]:
            return (
                f"engine.tensor_parallel_size: {ranks} leaves a rank {features} input features of {layer.name}, which "
                f"{quantize.format}'s blocks of {FIXED_BLOCKS[quantize.format]} do not divide; write 1, or add "
                f"'{layer.name}' to quantize.exclude"
            )
    return None


def _features_per_rank(layer: Linear, ranks: int) -> int:
    return layer.in_features // ranks if layer.name.endswith(ROW_PARALLEL) else layer.in_features


def largest_group_size(facts: ModelFacts, quantize: Quantization, backend: str, ranks: int = 1) -> int | None:
    """Returns the largest group size of the back end that divides every quantized layer, or None."""
    features = {_features_per_rank(layer, ranks) for layer in quantized_layers(facts, quantize)}
    return next((size for size in _BACKEND_GROUP_SIZES[backend] if not any(f % size for f in features)), None)


def quantized_layers(facts: ModelFacts, quantize: Quantization) -> tuple[Linear, ...]:
    """Returns the linear layers that the format applies to: all that no pattern of `exclude` matches.

    The output head is never among them: it is often the embedding too.
    """
    return tuple(layer for layer in facts.linears if not _excluded(layer.name, quantize.exclude))


@lru_cache(maxsize=10_000)  # a plan asks this of every layer for every engine that it considers
def _excluded(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
