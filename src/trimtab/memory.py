"""What serving a recipe needs in memory on each device: weights, KV cache, activations."""

from __future__ import annotations

import math

from trimtab import families, shapes
from trimtab.hardware import FIXED_BLOCKS, GB, NVFP4_BLOCK, Hardware, quantized_layers
from trimtab.model import ModelFacts
from trimtab.recipe import CASTS, GROUPED_FORMATS, Engine, Quantization, Recipe
from trimtab.schema import Document

#: Bytes of one number in the KV cache. NVFP4 has four bits, and a one-byte scale for each 16 numbers.
KV_CACHE_BYTES = {"none": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5 + 1 / NVFP4_BLOCK}


class Memory(Document):
    """What serving needs on each device, in bytes.

    The KV cache may take `Engine.kv_cache_fraction` of what weights and activations leave free.
    """

    weights: int
    kv_cache: int
    activations: int
    available: int
    kv_cache_fraction: float

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations

    @property
    def fits(self) -> bool:
        return self.kv_cache <= self.kv_cache_fraction * (self.available - self.weights - self.activations)

    @property
    def explanation(self) -> str:
        parts = f"{self.weights / GB:.2f} GB weights + {self.kv_cache / GB:.2f} GB KV cache + "
        parts += f"{self.activations / GB:.2f} GB activations = {self.total / GB:.2f} GB"
        return f"{parts} of {self.available / GB:.2f} GB: {'fits' if self.fits else 'does not fit'}"


def weight_bytes(facts: ModelFacts, recipe: Recipe) -> tuple[int, int]:
    """Returns the bytes of the linear layers, and of all other tensors, as served.

    INT4 takes half a byte a weight and a 2-byte scale a group; INT8 and FP8 take one byte and a 2-byte scale
    a row; FP4 takes half a byte and a one-byte scale a block; `mixed` at b bits has (8 - b) / 4 of its weights in
    INT4. What is not quantized takes 2 bytes, or 4 in `fp32`. `facts` are those of the model before it is pruned.
    """
    facts = shapes.pruned(facts, recipe.prune)
    rest = 2 * (facts.parameters - facts.linear_parameters)
    if recipe.quantize is None or recipe.quantize.format in CASTS:
        wide = 2 if recipe.quantize and recipe.quantize.format == "fp32" else 1
        return 2 * facts.linear_parameters * wide, rest * wide
    q = recipe.quantize
    if q.format in FIXED_BLOCKS:  # a one-byte scale a block
        each = 0.5 + 1 / FIXED_BLOCKS[q.format] - 2
        return round(2 * facts.linear_parameters + each * _quantized_parameters(facts, q)), rest
    four = float(q.format in GROUPED_FORMATS)  # the share of the weights that has four bits
    if q.effective_bits:
        four = (8 - q.effective_bits) / 4
    linears = 2.0 * facts.linear_parameters
    for layer in quantized_layers(facts, q):
        per_weight = four * (0.5 + 2 / q.group_size) + (1 - four)
        linears += layer.parameters * (per_weight - 2) + (1 - four) * 2 * layer.out_features
    return round(linears), rest


def _quantized_parameters(facts: ModelFacts, quantize: Quantization) -> int:
    return sum(layer.parameters for layer in quantized_layers(facts, quantize))


def kv_bytes_per_token(facts: ModelFacts, recipe: Recipe) -> int:
    """Returns the bytes that one token keeps on one device: blocks x the numbers that the family caches x bytes;
    with ordinary attention these are 2 x KV heads x head_dim.

    One scale a layer is not counted. Where the format is only emulated the cache holds 16 bits: see `memory`.
    """
    facts = shapes.pruned(facts, recipe.prune)
    heads = math.ceil(facts.kv_heads / recipe.engine.tensor_parallel_size)
    blocks = math.ceil(facts.layers / recipe.engine.pipeline_parallel_size)
    each = KV_CACHE_BYTES[recipe.kv_cache_format]
    attention = families.named(facts.model_type).attention
    return math.ceil(blocks * attention.cached_numbers(heads, facts.head_dim) * each)


def memory(facts: ModelFacts, recipe: Recipe, hardware: Hardware) -> Memory:
    """Returns what the recipe needs on each device when the engine serves its largest batch at full length, or when
    its KV cache holds the `kv_cache_tokens` of the recipe.

    Tensor parallelism splits the linear layers and the KV heads, pipeline parallelism the blocks; embeddings
    and lm_head are counted whole on each device. Activations are an estimate: for the tokens of one step,
    four hidden vectors and three intermediate ones in 16 bits (one block at a time), and the logits of one
    token for each sequence in 32 bits; for `torch`, which computes long inputs so, one dequantised layer too.
    Weights or a KV cache in a format that is emulated are held in 16 bits. Training memory (distillation) is
    not counted. On a CPU the ranks share one memory, so each has its part of it.
    """
    engine = recipe.engine
    served = _as_held(recipe, hardware)
    linears, rest = weight_bytes(facts, served)
    left = shapes.pruned(facts, recipe.prune)
    length = min(engine.max_seq_len, facts.max_position_embeddings)
    tokens = min(engine.max_num_tokens, engine.max_batch_size * length)
    width = 4 * left.hidden_size + 3 * math.ceil(left.intermediate_size / engine.tensor_parallel_size)
    activations = tokens * width * 2 + engine.max_batch_size * facts.vocab_size * 4
    if engine.backend == "torch" and recipe.quantize:
        activations += 2 * max((layer.parameters for layer in left.linears), default=0)
    return Memory(
        weights=_on_each(linears, facts, recipe) + rest,
        kv_cache=(engine.kv_cache_tokens or engine.max_batch_size * length) * kv_bytes_per_token(facts, served),
        activations=activations,
        available=_available(engine, hardware),
        kv_cache_fraction=engine.kv_cache_fraction,
    )


def max_context_tokens(facts: ModelFacts, recipe: Recipe, hardware: Hardware, weights: int) -> int:
    """Returns the longest context that the recipe's world holds beside its weights, in tokens.

    That is at most what the model can read. Each device has its share of `weights`, the bytes of a measured artifact,
    as `memory` shares them out; of a model that is not quantized, or in a format that the target only emulates, they
    are as it is served, whatever type its files have.
    """
    engine, held = recipe.engine, _as_held(recipe, hardware)
    linears, rest = weight_bytes(facts, held)
    if recipe.quantize and recipe.quantize.format not in CASTS and held.weight_format == recipe.weight_format:
        linears = max(0, weights - rest)
    free = _available(engine, hardware) - _on_each(linears, facts, recipe) - rest
    tokens = int(free * engine.kv_cache_fraction) // kv_bytes_per_token(facts, held)
    return min(max(0, tokens), facts.max_position_embeddings)


def _on_each(linears: float, facts: ModelFacts, recipe: Recipe) -> int:
    """Bytes of the linear layers on each device: tensor parallelism splits them, pipeline parallelism the blocks."""
    layers = shapes.pruned(facts, recipe.prune).layers
    stage = math.ceil(layers / recipe.engine.pipeline_parallel_size) / layers
    return round(linears * stage / recipe.engine.tensor_parallel_size)


def _available(engine: Engine, hardware: Hardware) -> int:
    """Bytes that each device has; on a CPU the ranks share one memory."""
    return hardware.memory_bytes // (1 if hardware.compute_capability else engine.world_size)


def _as_held(recipe: Recipe, hardware: Hardware) -> Recipe:
    """Returns the recipe with what the target only emulates in 16 bits."""
    changes = {"format": "bf16", "effective_bits": None} if hardware.is_emulated(recipe) else {}
    if hardware.is_kv_cache_emulated(recipe):
        changes["kv_cache"] = "none"
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update=changes)}) if changes else recipe
