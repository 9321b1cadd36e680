"""What the work of each stage holds at once: on each device, in the machine's memory, on a scratch disk.

`memory` has what is served and what is trained; here stands all else that a stage holds, by the way in which it works:

| work | holds |
|---|---|
| measuring | a block and the next one on its way, what goes from block to block, and what it sums up |
| rewriting | a shard of the source and what becomes of it |
| writing text | the model, and a KV cache |
| judging | the engines of baseline and candidate, of one that goes by block two blocks; what is computed at once |

On a CPU the device's memory is the machine's. tests/components/test_resources.py compares it with what stages use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from trimtab.families.fusion import block_of
from trimtab.model import memory, shapes
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import Hardware
from trimtab.recipe import Recipe

#: A process that has loaded PyTorch, transformers and ModelOpt: on a CPU, and with CUDA's context and libraries in the
#: machine's memory.
PROCESS = {"cpu": 600_000_000, "cuda": 3_500_000_000}
#: CUDA's context on a device, and what its allocator keeps unused.
CONTEXT, SLACK = 700_000_000, 1.1
#: Windows of text that are measured at once (`runtime.measure.observe.batches`).
_WINDOWS = {"cpu": 1, "cuda": 8}
#: The share of a device's memory that what goes from block to block may take before it goes further away
#: (`runtime.measure.activations`).
_DEVICE_SHARE = 1 / 8
#: Bytes of the source that a shard is made from (`runtime.checkpoint.stream`).
_SHARD = 512 << 20
#: Tokens that gradients are averaged over, and of whose logits a teacher stores some at once.
_GRADIENT_TOKENS, _LOGIT_TOKENS = 4096, 1024
#: Bytes of a file of a checkpoint of training, which is made in memory (`components.distillation.training.resume`).
_CHECKPOINT_FILE = 1 << 30
#: What text is written with: windows at once, and bytes of their KV cache (`components.distillation.text.generation`).
_WRITTEN_AT_ONCE, _WRITTEN_CACHE = {"cpu": 16, "cuda": 1024}, 16 << 30


class Held(NamedTuple):
    """Bytes on each device, which on a CPU is the machine; of the machine beside that and the process; on a disk."""

    device: float
    host: float = 0
    disk: float = 0


@dataclass(frozen=True)
class Work:
    """The work of a recipe on a model; `facts` are those of the model before it is pruned."""

    facts: ModelFacts
    recipe: Recipe
    hardware: Hardware

    @property
    def device(self) -> str:
        return "cpu" if self.hardware.compute_capability is None else "cuda"

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.device == "cpu" else 2

    @cached_property
    def left(self) -> ModelFacts:
        """The model once it is pruned."""
        return shapes.pruned(self.facts, self.recipe.prune)

    def whole(self, facts: ModelFacts) -> float:
        """A loaded model; on a CPU with the pages of the files that it was read from."""
        return self.width * (facts.parameters - facts.beside) + (facts.bytes if self.device == "cpu" else 0)

    def measuring(
        self,
        facts: ModelFacts,
        tokens: int,
        length: int,
        summed: float = 0,
        streams: int = 1,
        disk: float = 0,
        windows: int | None = None,
    ) -> Held:
        """A pass over text, a block at a time (`runtime.measure.blockwise`).

        Args:
            tokens, length: of the text, and of a window of it.
            summed: bytes of what a block is measured for.
            streams: how often what goes from block to block is held.
            windows: of a batch, where it is another than usual.
        """
        at_once = min(tokens, (windows or _WINDOWS[self.device]) * length)
        between = streams * self.width * tokens * facts.hidden_size
        stored = 2 if self.device == "cpu" else 0  # what is read of a file counts until the file is closed
        block = facts.largest_block
        entering = (self.width + stored) * facts.vocab_size * facts.hidden_size
        running = (2 * self.width + stored) * block + at_once * memory.activation_bytes(facts, self.width) + summed
        running += memory.scan_bytes(facts, at_once, length, self.device)
        device = max(entering, running)
        return self._through_blocks(device, between, (2 + 2 * self.width) * block, disk)

    def by_block(self, recipe: Recipe, tokens: int) -> Held:
        """An engine that scores so many tokens together, a block at a time, in 16 bits (`runtime.engines.by_block`)."""
        facts, stored = self.facts, 2 if self.device == "cpu" else 0
        block, at_once = facts.largest_block, min(tokens, recipe.engine.max_num_tokens)
        outside = (2 + stored) * (facts.parameters - facts.linear_parameters)
        running = (4 + stored) * block + memory.step_bytes(facts, at_once)
        running += memory.scan_bytes(facts, at_once, recipe.engine.max_seq_len, self.device)
        return self._through_blocks(max(outside, running), 2 * tokens * facts.hidden_size, 6 * block)

    def _through_blocks(self, device: float, between: float, read: float, disk: float = 0) -> Held:
        """Adds what goes from block to block, and what is read of the next block into a GPU's machine."""
        if self.device == "cpu":
            return Held(device + between, 0, disk)
        if between <= _DEVICE_SHARE * self.hardware.memory_bytes:
            return Held(device + between, read, disk)
        return Held(device, read + between, disk)

    def rewriting(self, facts: ModelFacts, written: float) -> Held:
        """A checkpoint written anew, a shard at a time: the shard that is read, what becomes of it, and in float32 the
        layers that are worked on together.

        Args:
            written: bytes of the new checkpoint.
        """
        block = 2 * facts.largest_block
        shard = max(min(_SHARD, facts.bytes), block)
        together = 4 * max((layer.parameters for layer in facts.linears), default=0)
        worked_on = 6 * together
        outside = 2 * facts.vocab_size * facts.hidden_size
        host = max(shard, outside) * (1 + written / max(facts.bytes, 1))
        return Held(worked_on, host, 2 * written)

    def written_text(self) -> Held:
        """A teacher that writes text, or says its logits."""
        distill, facts = self.recipe.distill, self.facts
        windows = min(max(1, distill.generate // distill.length), _WRITTEN_AT_ONCE[self.device])
        each = self.width * facts.attention_blocks * facts.kv_heads * facts.head_numbers * distill.length
        cache = min(windows * each, max(_WRITTEN_CACHE, each))
        step = windows * facts.vocab_size * 4 * 3
        return Held(self.whole(facts) + cache + step, 0, 4 * distill.generate)

    def stored_logits(self) -> Held:
        distill, facts = self.recipe.distill, self.facts
        tokens = distill.tokens
        each = distill.stored_logits * (4 if facts.vocab_size <= 1 << 16 else 6) + 8
        step = _LOGIT_TOKENS * (facts.vocab_size * 4 * 3 + memory.activation_bytes(facts, self.width))
        return Held(self.whole(facts) + step, 0, tokens * each)

    def opened(self, recipe: Recipe) -> float:
        """An engine that answers a short prompt: its weights, on a CPU with the pages of the export's files."""
        files = sum(memory.weight_bytes(self.facts, recipe)) if self.device == "cpu" else 0
        return memory.memory(self.facts, recipe, self.hardware).weights + files

    def served(self, recipe: Recipe) -> float:
        """An engine that is judged: besides, what it computes at once, and a KV cache for that."""
        need = memory.memory(self.facts, recipe, self.hardware)
        return self.opened(recipe) + need.activations + min(need.kv_cache, need.activations) + need.state

    @property
    def export_bytes(self) -> int:
        return sum(memory.weight_bytes(self.facts, self.recipe))


def gram_bytes(facts: ModelFacts, block: bool = False) -> int:
    """Returns the bytes of the Gram matrices of all inputs, or of those of one block: 4 x in_features² an input."""
    inputs = {(block_of(layer.name), layer.in_features, _input_of(layer.name)) for layer in facts.linears}
    sizes: Counter[int | None] = Counter()
    for number, features, _ in inputs:
        sizes[number] += 4 * features**2
    return max(sizes.values(), default=0) if block else sum(sizes.values())


def _input_of(name: str) -> str:
    """What tells the inputs of layers of one block apart as far as their names do: their module."""
    module, _, layer = name.rpartition(".")
    return f"{module}.{'out' if layer in ('o_proj', 'down_proj', 'w2') else 'in'}"


def measuring_gradients(work: Work, tokens: int, length: int) -> Held:
    """Forward and back: what goes into each block is kept in the machine's memory, then layers are scored."""
    facts, width = work.left, work.width
    tokens = min(tokens, max(_GRADIENT_TOKENS, length))
    head = width * facts.vocab_size * facts.hidden_size * (1 if facts.tied_embeddings else 2)
    logits = head + 4 * 4 * length * facts.vocab_size
    scored = 8 * 4 * max((layer.parameters for layer in facts.linears), default=0)  # in several formats, in float32
    found = work.measuring(facts, tokens, length, streams=2, windows=1)
    kept = facts.layers * width * tokens * facts.hidden_size
    device = max(found.device, logits, scored)
    return Held(device + kept, 0) if work.device == "cpu" else Held(device, found.host + kept)


def rounding_by_gptq(work: Work, tokens: int, length: int) -> Held:
    """A block at a time, on the model as quantized so far and, beside that, on the dense one; of a group of layers the
    Gram matrix with what it is solved by, and the weights in float32. A block's file goes when its shard is written."""
    facts = work.left
    inputs = max((layer.in_features for layer in facts.linears), default=0)
    layer = max((layer.parameters for layer in facts.linears), default=0)
    between = work.width * tokens * facts.hidden_size
    summed = 6 * 4 * inputs**2 + 6 * 4 * layer
    streams = 1 + work.recipe.quantize.follows_dense(tokens)
    return work.measuring(facts, tokens, length, summed, streams, 2 * work.export_bytes + streams * between)


def training(work: Work) -> Held:
    """See `memory.training`; on a disk a checkpoint and the one that takes its place, and so with the best student so
    far; in the machine's memory files of it as they are written, and where several processes train, in the first of
    them the student at the end."""
    need, distill = memory.training(work.facts, work.recipe, work.hardware), work.recipe.distill
    student = work.left.parameters - work.left.beside
    disk = (2 + 2 * bool(distill.early_stopping)) * 12 * student + 2 * student
    host = 2 * _CHECKPOINT_FILE + (2 * student if distill.processes > 1 else 0)
    if work.device == "cpu":
        pages = work.facts.bytes + work.left.bytes
        return Held(distill.processes * need.total + pages, host, disk)
    return Held(need.total, host, disk)
