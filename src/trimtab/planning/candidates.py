"""What techniques are made of: the recipes of one goal, model, target and back end, each with what to expect of it.

The expectations are other people's measurements, named in each. What holds here, the attempt measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from trimtab import families
from trimtab.catalog.formats import FORMATS
from trimtab.catalog.goals import GOALS
from trimtab.model import shapes
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import Hardware
from trimtab.model.linear_layers import largest_group_size
from trimtab.planning import placement
from trimtab.recipe import (
    CALIBRATED_FORMATS,
    GROUPED_FORMATS,
    DepthPruning,
    Distillation,
    Engine,
    Pruning,
    Quantization,
    Recipe,
    WidthPruning,
)
from trimtab.recipe.workload import Workload

_STUDENT = (
    "taught by the whole model: up to a third fewer parameters is worth it after 80 to "
    "100 billion tokens, 2.5 billion closed 87 % of the gap of a 9B model (ModelOpt examples/pruning); this "
    "is a first try"
)
_TRAINED = {
    "int4_rtn": "INT4 that training made up for, with the weights rounded in every step: perplexity ratio 1.00 after "
    "2.5 million tokens, 1.39 without (SmolLM2-135M; `benchmarks/distillation.py`)",
    "nvfp4": "NVFP4 that training made up for, with weights and activations rounded in every step: perplexity ratio "
    "1.05 after 2.5 million tokens, 1.16 by calibration alone (SmolLM2-135M; `benchmarks/distillation.py`)",
}
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
        self.goal = GOALS[goal]
        self.facts, self.hardware, self.backend, self.workload = facts, hardware, backend, workload
        self.formats = hardware.formats[backend]
        self.family = families.named(facts.model_type)
        served = "fp8" in hardware.kv_caches[backend] and self.family.attention.scaled is not None
        self.kv = served and self.goal.kv_cache
        order = ("fp8", "int8_sq", "int8_wo") if self.goal.busy else ("fp8", "int8_wo", "int8_sq")
        self.eights = [form for form in order if form in self.formats]

    def place(self, recipe: Recipe) -> tuple[Recipe | None, str]:
        """See `placement.place`."""
        return placement.place(recipe, self.goal.name, self.facts, self.hardware, self.workload)

    @property
    def mix(self) -> str:
        """The mixed precision that is served there, or the name of one where none is."""
        return next((form for form in ("mixed", "mixed_gpu") if form in self.formats), "mixed")

    @cached_property
    def unchanged(self) -> Recipe | None:
        """The model unchanged, with its engine; None where the target does not hold it."""
        return self.place(Recipe(engine=Engine(backend=self.backend)))[0]

    @cached_property
    def is_short(self) -> bool:
        """Whether the model's whole context does not fit beside its weights in eight bits."""
        if not self.eights:
            return True
        recipe, _ = self.place(self.quantized(self.eights[0], kv=self.kv)[0])
        return recipe is None or recipe.engine.max_seq_len < self.facts.max_position_embeddings

    def quantized(
        self,
        form: str,
        *,
        kv: bool = False,
        bits: float | None = None,
        max_time: float | None = None,
        keep_down: bool = False,
    ) -> Candidate:
        """Returns the recipe that stores weights in a format.

        Args:
            kv: whether the KV cache is stored in FP8.
            bits: the mean of a format that mixes.
            max_time: the most time that it may take, at the goal's batch.
            keep_down: whether the FFN's down projection stays in 16 bits.
        """
        widest, head = self.family.mlp or self.family.experts, self.family.head
        down = widest.down if widest else self.family.recurrent.output
        exclude = (head, f"*.{down}") if keep_down else (head,)
        timed = {"max_time": max_time, "step_tokens": self.goal.batch} if max_time else {}
        quantize = Quantization(
            format=form, effective_bits=bits, kv_cache="fp8" if kv else "none", exclude=exclude, **timed
        )
        if form in GROUPED_FORMATS:
            size = largest_group_size(self.facts, quantize, self.backend)
            quantize = quantize.model_copy(update={"group_size": size} if size else {})
        recipe = Recipe(quantize=quantize, engine=Engine(backend=self.backend))
        if keep_down:
            recipe = recipe.model_copy(update={"name": f"{recipe.title}, {down} in 16 bits"})
        why = [FORMATS[form].expect, _KV if kv else "", _NO_DOWN.format(down=down) if keep_down else ""]
        return recipe, "; ".join(filter(None, why))

    def trained(self, form: str) -> Iterator[Candidate]:
        """The nearest numbers of a format, of the whole model trained with the rounding: too long a work for a CPU."""
        if form in self.formats and self.hardware.compute_capability is not None:
            recipe, _ = self.quantized(form)
            if form in CALIBRATED_FORMATS:
                nearest = recipe.quantize.model_copy(update={"method": "nearest"})
                recipe = recipe.model_copy(update={"quantize": nearest})
            length = min(2048, self.facts.max_position_embeddings)
            distill = Distillation(tokens=10_000_000, batch_size=16, length=length, quantization_aware=True)
            yield recipe.model_copy(update={"distill": distill}), _TRAINED[form]

    def students(self) -> Iterator[Candidate]:
        """A quarter, then an eighth of the blocks' parameters removed; distilled; in the first eight-bit format."""
        form = self.eights[0] if self.eights else "bf16"
        recipe, why = self.quantized(form, kv=self.kv)
        if form == "bf16" and not self.kv:
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
            if not shapes.refusal(self.facts, narrower):
                return narrower, _NARROWER
        return DepthPruning(method="depth", blocks=blocks), "fewer blocks"
