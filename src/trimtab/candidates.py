"""The recipes that a goal asks for, in the decision matrix's order, each with what to expect of it and who says so.

Within a technique the most ambitious recipe stands first; the last is the safest. Unstructured sparsity is never one:
today's engines gain no speed by it (ModelOpt #1974, vllm#36799), and the stored tensors stay dense.

The expectations are other people's measurements, named in each. What holds here, the attempt measures.
"""

from __future__ import annotations

from collections.abc import Iterator

from trimtab import families, placing, shapes
from trimtab.catalog.formats import FORMATS
from trimtab.hardware import GB, GPUS, Hardware, check, largest_group_size
from trimtab.memory import memory
from trimtab.model import ModelFacts
from trimtab.recipe import (
    GROUPED_FORMATS,
    DepthPruning,
    Distillation,
    Engine,
    Pruning,
    Quantization,
    Recipe,
    WidthPruning,
)
from trimtab.serving.workload import Workload

_STUDENT = (
    "taught by the whole model: up to a third fewer parameters is worth it after 80 to "
    "100 billion tokens, 2.5 billion closed 87 % of the gap of a 9B model (ModelOpt examples/pruning); this "
    "is a first try"
)
_REHEARSED = (
    "INT4 that training made up for, with the weights rounded in every step: perplexity ratio 1.00 after 2.5 million "
    "tokens, 1.39 without (SmolLM2-135M; `benchmarks/distillation.py`)"
)
_NARROWER = (
    "a narrower FFN, which loses less than half as much log-perplexity as fewer blocks with as many parameters "
    "(SmolLM2-135M, not distilled; `benchmarks/pruning.py`)"
)
_KV = "the FP8 KV cache holds twice the tokens"
_NO_DOWN = "{down}, whose inputs have the largest outliers, stays in 16 bits"


Candidate = tuple[Recipe, str]


class Kit:
    """Makes the recipes of one goal, model, target and back end; `place` drops what cannot run there."""

    def __init__(
        self, goal: str, facts: ModelFacts, hardware: Hardware, backend: str, workload: Workload | None = None
    ):
        self.goal, self.facts, self.hardware, self.backend, self.workload = goal, facts, hardware, backend, workload
        self.formats = hardware.formats[backend]
        self.kv = "fp8" in hardware.kv_caches[backend]
        # Large batches are bound by arithmetic, so formats that also compute in 8 bits come first there.
        busy = goal in ("higher_throughput", "lower_cost")
        order = ("fp8", "int8_sq", "int8_wo") if busy else ("fp8", "int8_wo", "int8_sq")
        self.eights = [form for form in order if form in self.formats]
        self.family = families.named(facts.model_type)

    def place(self, recipe: Recipe) -> tuple[Recipe | None, str]:
        """See `placing.place`."""
        return placing.place(recipe, self.goal, self.facts, self.hardware, self.workload)

    def quantized(
        self, form: str, *, kv: bool = False, bits: float | None = None, keep_down: bool = False
    ) -> Candidate:
        down, head = self.family.mlp.down, self.family.head
        exclude = (head, f"*.{down}") if keep_down else (head,)
        quantize = Quantization(
            format=form, effective_bits=bits, kv_cache="fp8" if kv else "none", exclude=exclude
        )
        if form in GROUPED_FORMATS:
            size = largest_group_size(self.facts, quantize, self.backend)
            quantize = quantize.model_copy(update={"group_size": size} if size else {})
        recipe = Recipe(quantize=quantize, engine=Engine(backend=self.backend))
        if keep_down:
            recipe = recipe.model_copy(update={"name": f"{recipe.title}, {down} in 16 bits"})
        why = [FORMATS[form].expect, _KV if kv else "", _NO_DOWN.format(down=down) if keep_down else ""]
        return recipe, "; ".join(filter(None, why))

    def eight_bits(self) -> Iterator[Candidate]:
        """Each eight-bit format, with the KV cache in FP8 where that is served, then without."""
        for form in self.eights:
            if self.kv:
                yield self.quantized(form, kv=True)
            yield self.quantized(form)

    def four_bit_floats(self) -> Iterator[Candidate]:
        """NVFP4 where it is computed in, with the KV cache in FP8 where that is served, then without."""
        if "nvfp4" in self.formats:
            if self.kv:
                yield self.quantized("nvfp4", kv=True)
            yield self.quantized("nvfp4")

    def rehearsed(self) -> Iterator[Candidate]:
        """INT4 by rounding to nearest, of the whole model trained with the rounding: too long a work for a CPU."""
        if self.hardware.compute_capability is not None:
            recipe, _ = self.quantized("int4_rtn")
            length = min(2048, self.facts.max_position_embeddings)
            distill = Distillation(tokens=10_000_000, batch_size=16, length=length, quantization_aware=True)
            yield recipe.model_copy(update={"distill": distill}), _REHEARSED

    def students(self, *, kv: bool) -> Iterator[Candidate]:
        """A quarter, then an eighth of the blocks' parameters removed; distilled; in the first eight-bit format."""
        form = self.eights[0] if self.eights else "bf16"
        recipe, why = self.quantized(form, kv=kv and self.kv)
        if form == "bf16" and not (kv and self.kv):
            recipe = recipe.model_copy(update={"quantize": None})
        if self.backend == "torch" and self.hardware.compute_capability is None:
            distill = Distillation(tokens=65_536)
        else:
            length = min(2048, self.facts.max_position_embeddings)
            distill = Distillation(tokens=100_000_000, batch_size=16, length=length)
        for share in (4, 8):
            if self.facts.layers > 1:
                prune, smaller = self._smaller(max(1, self.facts.layers // share))
                student = recipe.model_copy(update={"prune": prune, "distill": distill})
                yield student, f"{smaller}, {_STUDENT}; {why}"

    def _smaller(self, blocks: int) -> tuple[Pruning, str]:
        """Removes as many parameters as so many blocks have: FFN neurons where that can be, else the blocks."""
        ffn = sum(layer.parameters for layer in self.facts.linears if layer.name.endswith(self.family.neurons))
        removed = blocks / self.facts.layers * self.facts.linear_parameters
        if removed < ffn:
            narrower = WidthPruning(method="width", ffn=round(removed / ffn, 2))
            if not shapes.check(self.facts, narrower):
                return narrower, _NARROWER
        return DepthPruning(method="depth", blocks=blocks), "fewer blocks"

    def safest(self) -> Iterator[Candidate]:
        form = "int8_wo" if "int8_wo" in self.eights else (self.eights or ["int4_awq"])[0]
        yield self.quantized(form, keep_down=True)


def _lower_latency(kit: Kit) -> Iterator[Candidate]:
    yield from kit.eight_bits()
    yield from kit.four_bit_floats()
    yield kit.quantized("int4_awq")
    yield kit.quantized("int4_gptq")
    yield from kit.rehearsed()
    yield kit.quantized("mixed", bits=5)
    yield from kit.students(kv=True)
    yield from kit.safest()


def _higher_throughput(kit: Kit) -> Iterator[Candidate]:
    # No INT4: at batch 64 it reaches 0.83x of BF16 (benchmark.md).
    unchanged = Recipe(engine=Engine(backend=kit.backend))
    whole, _ = kit.place(unchanged)
    eights = (*kit.eight_bits(), *kit.four_bit_floats())
    rungs = [*eights, *kit.students(kv=True), *(kit.safest() if kit.eights else ())]
    if not kit.eights and kit.kv:
        rungs.insert(0, kit.quantized("bf16", kv=True))
    for recipe, why in rungs:
        placed, _ = kit.place(recipe)
        if placed and (whole is None or placed.engine.world_size < whole.engine.world_size):
            wanted = f"needs {whole.engine.world_size} devices" if whole else "does not fit"
            why += f"; the unchanged model {wanted}, so the devices saved serve replicas"
        yield recipe, why


def _fit_larger_model(kit: Kit) -> Iterator[Candidate]:
    # NVFP4 keeps 93.8 % of Llama-3.1-8B's accuracy after rounding alone (`catalog.formats`), so INT4 stands beside it.
    # GPTQ begins with AWQ's scales and takes the same bytes; AWQ stands before it where nothing else on the ladder
    # wants Gram matrices, which a large model has many of. Rounding alone costs nothing, so it stands first on a CPU.
    plain = "int4_rtn" if "mixed" in kit.formats else "int4_awq"
    for form in ("nvfp4", plain, "int4_gptq"):
        yield kit.quantized(form)
    yield from kit.rehearsed()
    for bits in (5.0, 6.0, 7.0):
        yield kit.quantized("mixed", bits=bits)
    if not kit.eights:
        yield from kit.safest()
    if "mixed" not in kit.formats:  # where it is served, mixed precision is as small and needs no training
        yield from kit.students(kv=False)
    for form in ("fp8", "int8_wo"):
        yield kit.quantized(form)


def _long_context(kit: Kit) -> Iterator[Candidate]:
    int4 = kit.quantized("int4_awq", kv=kit.kv)
    short = True
    if kit.eights:
        eight, _ = kit.quantized(kit.eights[0], kv=kit.kv)
        recipe, _ = kit.place(eight)
        short = recipe is None or recipe.engine.max_seq_len < kit.facts.max_position_embeddings
    if short:  # the memory that INT4 frees goes into context; where eight bits reach the end, it only risks
        yield int4
    yield from kit.eight_bits()
    if not short:
        yield int4
    yield kit.quantized("bf16", kv=True)


def _lower_cost(kit: Kit) -> Iterator[Candidate]:
    quantized = (*kit.eight_bits(), *kit.four_bit_floats(), kit.quantized("int4_awq"))
    rungs = [*quantized, *kit.students(kv=True), *kit.safest()]
    for recipe, why in rungs:
        smaller = _smaller_gpu(recipe, kit)
        # INT4 is slow at the batches that cost little: it is here only when it makes a smaller GPU enough.
        if recipe.weight_format == "int4_awq" and kit.eights and not (smaller and not _smaller_gpu(rungs[0][0], kit)):
            continue
        yield recipe, f"{why}; {smaller}" if smaller else why


def _smaller_gpu(recipe: Recipe, kit: Kit) -> str:
    """Says which smaller GPU serves the recipe too, at eight sequences of the goal's length, or ''."""
    length = min(placing.SERVING["lower_cost"][1], kit.facts.max_position_embeddings)
    engine = recipe.engine.model_copy(update={"max_batch_size": 8, "max_seq_len": length})
    recipe = recipe.model_copy(update={"engine": engine})
    if kit.hardware.bandwidth:
        for gpu in sorted(GPUS.values(), key=lambda gpu: (gpu.memory_bytes, gpu.bandwidth)):
            smaller = gpu.memory_bytes < kit.hardware.memory_bytes
            if smaller and not check(recipe, gpu, kit.facts) and memory(kit.facts, recipe, gpu).fits:
                return f"a smaller GPU is enough: {gpu.name}, {gpu.memory_bytes // GB} GB"
    return ""


CANDIDATES = {
    "lower_latency": _lower_latency,
    "higher_throughput": _higher_throughput,
    "fit_larger_model": _fit_larger_model,
    "long_context": _long_context,
    "lower_cost": _lower_cost,
}
