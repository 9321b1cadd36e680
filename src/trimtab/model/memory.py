"""What a recipe needs in memory on each device: to serve it, and to train it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from trimtab import families
from trimtab.base.schema import Document
from trimtab.catalog.formats import Storage
from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.families import state_space
from trimtab.model import shapes
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import GB, Hardware
from trimtab.model.linear_layers import quantized_layers
from trimtab.recipe import Engine, MovementPruning, Quantization, Recipe, SparsePruning

#: Bytes of one chunk of float32 logits and how many copies of it a loss and its gradient hold, and the tokens whose
#: held-out loss is measured at once, on a CPU and on a GPU (`components.distillation.objective.chunks`, `.training`).
_CHUNK_BYTES, _CHUNK_COPIES = (32 << 20, 512 << 20), 4
_HELD_OUT_TOKENS = (1024, 16384)
#: The share of a device's memory that training may take: the rest is CUDA's context and what the allocator wastes.
TRAINING_SHARE = 0.9


class Memory(Document):
    """What serving needs on each device, in bytes.

    `state` is what recurrent blocks keep of the sequences of a batch. The KV cache may take `Engine.kv_cache_fraction`
    of what weights, activations and that leave free.
    """

    weights: int
    kv_cache: int
    activations: int
    available: int
    kv_cache_fraction: float
    state: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.state + self.activations

    @property
    def free(self) -> int:
        """What is left for the KV cache, and for what the device needs beside."""
        return self.available - self.weights - self.state - self.activations

    @property
    def fits(self) -> bool:
        return self.kv_cache <= self.kv_cache_fraction * self.free

    @property
    def explanation(self) -> str:
        parts = f"{self.weights / GB:.2f} GB weights + {self.kv_cache / GB:.2f} GB KV cache + "
        parts += f"{self.state / GB:.2f} GB recurrent state + " if self.state else ""
        parts += f"{self.activations / GB:.2f} GB activations = {self.total / GB:.2f} GB"
        return f"{parts} of {self.available / GB:.2f} GB: {'fits' if self.fits else 'does not fit'}"


def weight_bytes(facts: ModelFacts, recipe: Recipe) -> tuple[int, int]:
    """Returns the bytes of the linear layers, and of all other tensors, as served.

    INT4 takes half a byte a weight and a 2-byte scale a group; INT8 and FP8 take one byte and a 2-byte scale
    a row; FP4 takes half a byte and a one-byte scale a block; what mixes at b bits has (8 - b) / 4 of its weights in
    its fewest, and the others in eight: as many bytes as when some of them take 16. What is not quantized takes 2
    bytes, or 4 in `fp32`. `facts` are those of the model before it is pruned.
    """
    facts = shapes.pruned(facts, recipe.prune)
    rest = 2 * (facts.parameters - facts.linear_parameters)
    if recipe.quantize is None or recipe.quantize.row.is_cast:
        wide = round(recipe.quantize.row.bits / 16) if recipe.quantize else 1
        return 2 * facts.linear_parameters * wide, rest * wide
    return _linear_bytes(facts, recipe.quantize), rest


@lru_cache(maxsize=256)  # a plan asks this of the same few recipes for every engine that it considers
def _linear_bytes(facts: ModelFacts, quantize: Quantization) -> int:
    linears, shares = 2.0 * facts.linear_parameters, _shares(quantize)
    for layer in quantized_layers(facts, quantize):
        for storage, share in shares:
            stored = storage.bytes(layer.out_features, layer.in_features, quantize.group_size)
            linears += share * (stored - 2 * layer.parameters)
    return round(linears)


def _shares(quantize: Quantization) -> list[tuple[Storage, float]]:
    """How the weights are stored, and which share of them each way: a mix has as many as make its mean bits."""
    stored = [part.storage for part in quantize.row.parts]
    if not quantize.effective_bits:
        return [(stored[0], 1.0)]
    few, many = stored[0], stored[-1]
    share = (many.bits - quantize.effective_bits) / (many.bits - few.bits)
    return [(few, share), (many, 1 - share)]


def kv_bytes_per_token(facts: ModelFacts, recipe: Recipe) -> int:
    """Returns the bytes that one token keeps on one device: blocks with attention x the numbers that it caches x bytes.

    With ordinary attention these are 2 x KV heads x head_dim. Compressed keys and values belong to all heads, so each
    rank has them whole; the torch engine keeps keys and values as they are used. One scale a layer is not counted.
    Where the format is only emulated the cache holds 16 bits: see `memory`.
    """
    facts = shapes.pruned(facts, recipe.prune)
    heads = math.ceil(facts.kv_heads / recipe.engine.tensor_parallel_size)
    blocks = math.ceil(facts.attention_blocks / recipe.engine.pipeline_parallel_size)
    each = KV_CACHES[recipe.kv_cache_format].bytes
    latent = facts.latent_numbers if recipe.engine.backend != "torch" else 0
    return math.ceil(blocks * (latent or heads * facts.head_numbers) * each)


def state_bytes(facts: ModelFacts, recipe: Recipe) -> int:
    """Returns the bytes that one sequence keeps on one device in blocks with a recurrent state, whatever its length.

    Each rank of tensor parallelism is counted with all of it: engines differ in what of it they split.
    """
    facts = shapes.pruned(facts, recipe.prune)
    return math.ceil(facts.recurrent_blocks / recipe.engine.pipeline_parallel_size) * facts.state_bytes


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
    activations = step_bytes(left, tokens, engine.tensor_parallel_size) + engine.max_batch_size * facts.vocab_size * 4
    if engine.backend == "torch":
        activations += scan_bytes(left, tokens, length, "cuda" if hardware.compute_capability else "cpu")
        if recipe.quantize:
            activations += 2 * max((layer.parameters for layer in left.linears), default=0)
    return Memory(
        weights=_on_each(linears, facts, recipe) + rest,
        kv_cache=(engine.kv_cache_tokens or engine.max_batch_size * length) * kv_bytes_per_token(facts, served),
        activations=activations,
        available=_available(engine, hardware),
        kv_cache_fraction=engine.kv_cache_fraction,
        state=engine.max_batch_size * state_bytes(facts, served),
    )


def step_bytes(facts: ModelFacts, tokens: int, ranks: int = 1) -> int:
    """Returns what a step of so many tokens computes on the way, of one block, on each of the ranks that split it."""
    return tokens * 2 * (4 * facts.hidden_size + 3 * math.ceil(facts.intermediate_size / ranks))


def scan_bytes(facts: ModelFacts, tokens: int, length: int, device: str) -> int:
    """Returns what a state-space layer without kernels holds on the way of so many tokens, in texts of a length: their
    states, of no more texts at once than there is room for, and products as large; 0 for other models.

    Args:
        device: "cpu" or "cuda".
    """
    part = families.named(facts.model_type).recurrent
    if part is None or not part.holds_states:
        return 0
    return 2 * min(tokens * facts.state_bytes, max(state_space.ROOM[device], length * facts.state_bytes))


def max_context_tokens(facts: ModelFacts, recipe: Recipe, hardware: Hardware, weights: int) -> int:
    """Returns the longest context that the recipe's world holds beside its weights, in tokens.

    That is at most what the model can read. Each device has its share of `weights`, the bytes of a measured artifact,
    as `memory` shares them out; of a model that is not quantized, or in a format that the target only emulates, they
    are as it is served, whatever type its files have.
    """
    engine, held = recipe.engine, _as_held(recipe, hardware)
    linears, rest = weight_bytes(facts, held)
    if recipe.quantize and not recipe.quantize.row.is_cast and held.weight_format == recipe.weight_format:
        linears = max(0, weights - rest)
    free = _available(engine, hardware) - _on_each(linears, facts, recipe) - rest
    room = int(free * engine.kv_cache_fraction) - state_bytes(facts, held)
    each = kv_bytes_per_token(facts, held)
    if not each:  # a state does not grow
        return facts.max_position_embeddings if room >= 0 else 0
    return min(max(0, room // each), facts.max_position_embeddings)


def _on_each(linears: float, facts: ModelFacts, recipe: Recipe) -> int:
    """Bytes of the linear layers on each device: tensor parallelism splits them, pipeline parallelism the blocks."""
    layers = shapes.pruned(facts, recipe.prune).layers
    stage = math.ceil(layers / recipe.engine.pipeline_parallel_size) / layers
    return round(linears * stage / recipe.engine.tensor_parallel_size)


def _available(engine: Engine, hardware: Hardware) -> int:
    """Bytes that each device has; on a CPU the ranks share one memory."""
    return hardware.memory_bytes // (1 if hardware.compute_capability else engine.world_size)


class TrainingMemory(Document):
    """What distillation needs on each device, in bytes: both models' weights, the optimizer's states with the
    gradients, what is kept for the gradients (`activations`), the loss with what is computed on the way, and where
    several processes share the models out, what of these is whole at a time (`gathered`)."""

    weights: int
    states: int
    activations: int
    loss: int
    available: int
    gathered: int = 0
    processes: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.states + self.activations + self.loss + self.gathered

    @property
    def fits(self) -> bool:
        return self.total <= TRAINING_SHARE * self.available

    @property
    def explanation(self) -> str:
        parts = f"{self.weights / GB:.1f} GB weights of student and teacher + {self.states / GB:.1f} GB gradients and "
        parts += f"optimizer + {self.activations / GB:.1f} GB activations + {self.loss / GB:.1f} GB loss"
        parts += f" + {self.gathered / GB:.1f} GB gathered" if self.gathered else ""
        where = f" in each of {self.processes} processes" if self.processes > 1 else ""
        fits = "fits" if self.fits else "does not fit"
        return f"training needs {parts} = {self.total / GB:.1f} GB{where} of {self.available / GB:.0f} GB: {fits}"


def activation_bytes(facts: ModelFacts, width: int = 2) -> int:
    """Returns the bytes that autograd keeps of one token in one block: 109, 131 and 201 kB in Llama 3's 1B, 3B and 8B.

    In 16 bits (`width` 2), of h hidden channels, f neurons and a and k heads of d numbers: of each norm its input in
    float32 and two vectors behind it (8 h), of the FFN gate, its activation, up and their product (8 f), of attention
    queries and outputs (4 a d), keys and values (4 k d) and a float32 a head; and a float32 of each norm. In float32
    twice as much, but of norms 12 h each.
    """
    attention = 2 * width * facts.head_dim * (facts.heads + facts.kv_heads) + 4 * facts.heads
    norms = 2 * ((8 if width == 2 else 12) * facts.hidden_size + 4)
    return norms + 4 * width * facts.intermediate_size + attention


def training(facts: ModelFacts, recipe: Recipe, hardware: Hardware) -> TrainingMemory:
    """Returns what the recipe's distillation needs on each device, of each of its processes alike.

    On a GPU one process holds weights in 16 bits: of each parameter that is trained there are that, its gradient, and
    in float32 a master, its gradient and two moments, 20 bytes; on a CPU all is float32, 16 bytes. Several processes
    hold a part each of the student in float32, of its gradient and moments, and of the teacher, and gather a block at a
    time. Scores that are learned, of which each has all, and weights that are rounded while they train add to that in
    the linear layers. The teacher, with all its weights, stands beside the student unless its logits are stored.
    `facts` are those of the model before it is pruned.
    """
    distill, on_gpu = recipe.distill, hardware.compute_capability is not None
    width, processes = 2 if on_gpu else 4, distill.processes
    student = shapes.pruned(facts, recipe.prune)
    trained = student.parameters - student.beside
    teacher = 0 if distill.stored_logits else width * (facts.parameters - facts.beside)  # the rest is not loaded
    learned, made, gathered = isinstance(recipe.prune, MovementPruning), 0, 0
    states = (18 if on_gpu and processes == 1 else 12) * trained
    if isinstance(recipe.prune, SparsePruning):
        states += student.linear_parameters
    if learned or distill.quantization_aware:  # weights that are made of those that train, for each product
        made = (learned + distill.quantization_aware) * width
    if processes > 1:
        again = student.largest_block if distill.activation_checkpointing else student.linear_parameters
        gathered = _gathered(facts, student, width, bool(teacher)) + made * again
        made = 0
    tokens = distill.windows_at_once * distill.length
    block, hidden = activation_bytes(student, width), width * student.hidden_size
    if distill.quantization_aware and recipe.quantize.row.storage.inputs:
        block += 3 * hidden  # queries, keys and values have rounded inputs of their own each, and so have gate and up
    kept = (student.layers * hidden + block) if distill.activation_checkpointing else student.layers * block
    if distill.hidden_weight:
        kept += 2 * student.layers * hidden
    head = (4 + width) * facts.vocab_size * student.hidden_size
    passing = max(tokens, _HELD_OUT_TOKENS[on_gpu]) * width * (4 * facts.hidden_size + 3 * facts.intermediate_size)
    return TrainingMemory(
        weights=math.ceil(((width if processes == 1 else 4) * trained + teacher) / processes),
        states=math.ceil(states / processes) + (16 * learned + made) * student.linear_parameters,
        activations=tokens * (kept + 4 * hidden),
        loss=_CHUNK_COPIES * _CHUNK_BYTES[on_gpu] + head + passing,
        available=hardware.memory_bytes // (1 if on_gpu else processes),
        gathered=gathered,
        processes=processes,
    )


def _gathered(facts: ModelFacts, student: ModelFacts, width: int, runs_teacher: bool) -> int:
    """Bytes that are whole at a time in one of several processes, as FSDP2 gathers and deals out.

    Both heads are, from the loss to the end of the backward pass. Beside them there is a block, the next one on its way
    twice, as it comes and unpacked, or in its stead a gradient, and that in float32 as it is averaged; in the end
    instead the head's gradient in float32, and that of an embedding of its own.
    """
    table = facts.vocab_size * student.hidden_size
    heads = width * (table + runs_teacher * facts.vocab_size * facts.hidden_size)
    ending = (4 + (0 if student.tied_embeddings else width)) * table
    return heads + max((3 * width + 4) * student.largest_block, ending)


def trainable(facts: ModelFacts, recipe: Recipe, hardware: Hardware, most: int = 1) -> Recipe | None:
    """Returns the recipe with a training that fits: on as few devices as can be, its batch in as few parts, or else
    with activation checkpointing too, which costs a third more time; None where no training does.

    Args:
        most: devices; as many as the recipe's own processes are never too many.
    """
    return next((tried for tried in _trainings(recipe, most) if training(facts, tried, hardware).fits), None)


def least_training(facts: ModelFacts, recipe: Recipe, hardware: Hardware, most: int = 1) -> TrainingMemory:
    """Returns what the training of the recipe needs that needs the least, one window at a time with checkpointing."""
    needs = (training(facts, tried, hardware) for tried in _trainings(recipe, most))
    return min(needs, key=lambda need: need.total / need.available)


def _trainings(recipe: Recipe, most: int) -> Iterator[Recipe]:
    """The recipe with its batch in ever more parts, then so with checkpointing, then on twice the devices."""
    distill, processes = recipe.distill, recipe.distill.processes
    while processes == distill.processes or (processes <= most and distill.batch_size % processes == 0):
        whole = distill.batch_size // processes
        for checkpointing in sorted({distill.activation_checkpointing, True}):
            for parts in (n for n in range(1, whole + 1) if whole % n == 0):
                if parts < distill.gradient_accumulation and processes == distill.processes:
                    continue
                fields = {"gradient_accumulation": parts, "activation_checkpointing": checkpointing}
                fields |= {"processes": processes}
                yield recipe.model_copy(update={"distill": distill.model_copy(update=fields)})
        processes *= 2


def _as_held(recipe: Recipe, hardware: Hardware) -> Recipe:
    """Returns the recipe with what the target only emulates in 16 bits."""
    changes = {"format": "bf16", "effective_bits": None} if hardware.is_emulated(recipe) else {}
    if hardware.is_kv_cache_emulated(recipe):
        changes["kv_cache"] = "none"
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update=changes)}) if changes else recipe
