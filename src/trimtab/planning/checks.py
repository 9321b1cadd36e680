"""Why a target cannot run a recipe: asked before any accelerator is."""

from __future__ import annotations

from fnmatch import fnmatchcase

from trimtab import families
from trimtab.base.errors import nearest
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.contracts import version
from trimtab.catalog.formats import FORMATS
from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.families.fusion import groups
from trimtab.model import shapes
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import Hardware
from trimtab.model.linear_layers import features_per_rank, quantized_layers, splits
from trimtab.recipe import GROUPED_FORMATS, Quantization, Recipe
from trimtab.serving import vllm


def refusal(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    """Returns why the target cannot run the recipe on this model, in one sentence, or None when it can.

    Memory is not looked at here: `trimtab.model.memory` does that.
    """
    if reason := (
        _check_backend(recipe, hardware) or _check_format(recipe, hardware) or shapes.refusal(facts, recipe.prune)
    ):
        return reason
    facts = shapes.pruned(facts, recipe.prune)
    return (
        _check_heads(recipe, facts)
        or _check_kv_cache(recipe, hardware, facts)
        or _check_architecture(recipe, facts)
        or _check_exclusions(recipe, facts)
        or _check_stages(recipe, facts)
        or _check_parallelism(recipe, facts)
        or (check_packing(recipe.quantize, facts) if recipe.quantize else None)
        or _check_group_size(recipe, hardware, facts)
        or _check_blocks(recipe, facts)
        or _check_channel_scales(recipe, facts)
    )


def _check_backend(recipe: Recipe, hardware: Hardware) -> str | None:
    backend = recipe.engine.backend
    if backend not in hardware.formats:
        remedy = nearest(backend, hardware.backends)
        return f"engine.backend: '{backend}' does not run on {hardware.name}; {remedy}"
    return vllm.settings_refusal(recipe.engine) if backend == "vllm" else None


def _check_heads(recipe: Recipe, facts: ModelFacts) -> str | None:
    """vLLM 0.24 takes the rows of GPTBigCode's `c_attn` for all queries, then all keys: so they stand with one head of
    keys, and head by head with several."""
    backend = recipe.engine.backend
    if backend in families.named(facts.model_type).misread_heads and facts.kv_heads > 1:
        what = f"reads the queries, keys and values of a '{facts.model_type}' with {facts.kv_heads} KV heads"
        return f"engine.backend: {backend} {what} in another order; write 'torch'"
    return None


def _check_format(recipe: Recipe, hardware: Hardware) -> str | None:
    backend, name = recipe.engine.backend, recipe.weight_format
    native = hardware.formats[backend]
    if name not in native and not hardware.is_emulated(recipe):
        served = ", ".join(native)
        storage = FORMATS[name].storage
        in_fp8 = storage is not None and storage.numbers == "e4m3"
        if in_fp8 and hardware.compute_capability and hardware.compute_capability < (8, 9):
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
    return version.too_old(FORMATS[name], recipe.engine.tensorrt_llm) if backend == "trtllm" else None


def _check_architecture(recipe: Recipe, facts: ModelFacts) -> str | None:
    served = BACKENDS[recipe.engine.backend].architectures
    if served and facts.architecture not in served:
        known = " and ".join(served)
        return f"engine.backend: {recipe.engine.backend} builds {known} alone, no {facts.architecture}; write 'trtllm'"
    return None


def _check_kv_cache(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    backend, kv_cache = recipe.engine.backend, recipe.kv_cache_format
    served = hardware.kv_caches[backend]
    if kv_cache not in served and not hardware.is_kv_cache_emulated(recipe):
        remedy = f"write one of: {', '.join(served)}" if len(served) > 1 else "write 'none'"
        elsewhere = [other for other in hardware.backends if kv_cache in hardware.kv_caches[other]]
        hint = f", or engine.backend: {elsewhere[0]}" if elsewhere else ""
        needed = KV_CACHES[kv_cache].served.get(backend)
        if needed and hardware.compute_capability:
            (major, minor), (low, high) = hardware.compute_capability, needed
            return (
                f"quantize.kv_cache: {backend} serves {kv_cache} on compute capability {_range(low, high)} and "
                f"{hardware.name} has {major}.{minor}; {remedy}{hint}"
            )
        return f"quantize.kv_cache: {backend} serves no {kv_cache} KV cache on {hardware.name}; {remedy}{hint}"
    if kv_cache != "none" and (why := families.named(facts.model_type).attention.unscaled):
        return f"quantize.kv_cache: a '{facts.model_type}' {why}; write 'none'"
    form, row = recipe.weight_format, BACKENDS[backend]
    if (form, kv_cache) in row.clashes:
        return f"quantize.kv_cache: {backend} cannot build {form} with an {kv_cache} KV cache; write 'none'"
    if kv_cache != "none" and not row.kv_cache_alone and FORMATS[form].is_cast:
        return (
            f"quantize.kv_cache: {backend} reads {kv_cache} beside quantized weights alone; write 'none', or "
            "format: fp8"
        )
    if (block := KV_CACHES[kv_cache].block) and facts.head_dim % block:
        return (
            f"quantize.kv_cache: {kv_cache} has a scale for each {block} numbers of a head, which do not divide "
            f"this model's {facts.head_dim}; write 'fp8'"
        )
    return None


def _range(first: tuple[int, int], last: tuple[int, int]) -> str:
    start = ".".join(map(str, first))
    return f"{start} or later" if last[0] == 99 else f"{start} to {'.'.join(map(str, last))}"


def _check_exclusions(recipe: Recipe, facts: ModelFacts) -> str | None:
    quantize = recipe.quantize
    if quantize is None or quantize.row.is_cast:
        return None
    head = families.named(facts.model_type).head
    for pattern in quantize.exclude:
        if not any(fnmatchcase(name, pattern) for name in (head, *(layer.name for layer in facts.linears))):
            names = [layer.name for layer in facts.linears]
            endings = [*sorted({f"*.{name.rpartition('.')[2]}" for name in names}), head]
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
    if recipe.engine.backend == "torch" and stages > 1 and not families.named(facts.model_type).pipeline_parallel:
        return f"engine.pipeline_parallel_size: torch has no way to share out a '{facts.model_type}'; write 1"
    if stages > blocks:
        return f"engine.pipeline_parallel_size: {stages} stages for {blocks} blocks; write at most {blocks}"
    if blocks % stages:
        good = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
        return f"engine.pipeline_parallel_size: {stages} does not divide {blocks} blocks; write one of: {good}"
    return None


def _check_parallelism(recipe: Recipe, facts: ModelFacts) -> str | None:
    engine, ranks = recipe.engine, recipe.engine.tensor_parallel_size
    if engine.backend == "torch" and ranks > 1 and not families.named(facts.model_type).tensor_parallel:
        return f"engine.tensor_parallel_size: torch has no way to split the layers of a '{facts.model_type}'; write 1"
    good = [size for size in range(1, facts.heads + 1) if splits(facts, size)]
    if ranks not in good:
        return (
            f"engine.tensor_parallel_size: {ranks} does not divide {facts.heads} attention heads and "
            f"{facts.kv_heads} KV heads; write one of: {', '.join(map(str, good))}"
        )
    return None


def check_packing(quantize: Quantization, facts: ModelFacts) -> str | None:
    """Returns why a format cannot store a layer of this model, whatever the target, or None when it can.

    The group sizes of INT4 depend on the target besides: `refusal` looks at them.
    """
    form, stored = quantize.format, [part.storage for part in quantize.row.parts]
    block = max((storage.block for storage in stored), default=0) or 1
    in_pairs = any(storage.number.packed == "out" for storage in stored)
    for layer in quantized_layers(facts, quantize):
        keep = f"add '{layer.name}' to quantize.exclude"
        if layer.in_features % block:
            return (
                f"quantize.format: {form} has a scale for each {block} weights of a row, which do not divide the "
                f"{layer.in_features} of {layer.name}; {keep}"
            )
        if in_pairs and layer.out_features % 2:
            return (
                f"quantize.format: {form} stores output features in pairs, and {layer.name} has "
                f"{layer.out_features}; {keep}"
            )
    return None


def _check_group_size(recipe: Recipe, hardware: Hardware, facts: ModelFacts) -> str | None:
    quantize, backend = recipe.quantize, recipe.engine.backend
    if quantize is None or quantize.format not in GROUPED_FORMATS:
        return None
    served = BACKENDS[backend].group_sizes
    if quantize.group_size not in served:
        sizes = ", ".join(map(str, served))
        return f"quantize.group_size: {backend} has no groups of {quantize.group_size}; write one of: {sizes}"
    for layer in quantized_layers(facts, quantize):
        features = features_per_rank(facts, layer, recipe.engine.tensor_parallel_size)
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
    blocks = [part.storage.block for part in quantize.row.parts if part.storage.block] if quantize else []
    if not blocks:
        return None
    for layer in quantized_layers(facts, quantize):
        if (features := features_per_rank(facts, layer, ranks)) % max(blocks):
            return (
                f"engine.tensor_parallel_size: {ranks} leaves a rank {features} input features of {layer.name}, which "
                f"{quantize.format}'s blocks of {max(blocks)} do not divide; write 1, or add "
                f"'{layer.name}' to quantize.exclude"
            )
    return None


def _check_channel_scales(recipe: Recipe, facts: ModelFacts) -> str | None:
    """Scales of a fused layer's input channels must fold into the norm before it, where an engine reads no others."""
    quantize, family = recipe.quantize, families.named(facts.model_type)
    if not BACKENDS[recipe.engine.backend].folds_scales or not quantize:
        return None
    if not any(part.channels and part.storage.pre_quant_scale for part in quantize.row.parts):
        return None  # else layers whose scale nothing takes go without
    fused = (shared for shared in family.inputs if len(shared.layers) > 1 and not (shared.norm and family.folds))
    names = {layer.name for shared in fused for layer in shared.layers}
    for layer in quantized_layers(facts, quantize) if names else ():
        if family.layer(layer.name).name in names and family.scales_channels(layer.name):
            return (
                f"quantize.format: {quantize.format} scales the input of {layer.name}, no norm of a "
                f"'{facts.model_type}' can take that scale, and {recipe.engine.backend} reads none of layers that it "
                f"fuses; write int4_rtn, int8_wo or fp8, or engine.backend: vllm"
            )
    return None
