"""The recipe: what is done to one model, in order, how it is served, and what it must still be able to do.

Each section is a file of its own.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag, model_validator

from trimtab.base.schema import digest
from trimtab.base.user_document import UserDocument
from trimtab.recipe.acceptance import Acceptance
from trimtab.recipe.calibration import Calibration, Source
from trimtab.recipe.cost import Limits, Prices
from trimtab.recipe.distillation import Distillation
from trimtab.recipe.engine import SIZES, Engine
from trimtab.recipe.pruning import DepthPruning, MovementPruning, Pruning, SparsePruning, WidthPruning
from trimtab.recipe.quantization import (
    CALIBRATED_FORMATS,
    CASTS,
    GROUPED_FORMATS,
    MANY_TOKENS,
    MIXED_FORMATS,
    NEAREST_FORMATS,
    Format,
    KVCache,
    Quantization,
)
from trimtab.recipe.workload import Recorded, Workload, kind

__all__ = [
    "Acceptance",
    "CALIBRATED_FORMATS",
    "CASTS",
    "Calibration",
    "DepthPruning",
    "Distillation",
    "Engine",
    "Format",
    "GROUPED_FORMATS",
    "KVCache",
    "Limits",
    "MANY_TOKENS",
    "MIXED_FORMATS",
    "MovementPruning",
    "NEAREST_FORMATS",
    "Prices",
    "Pruning",
    "Quantization",
    "Recipe",
    "Source",
    "SparsePruning",
    "WidthPruning",
]


class Recipe(UserDocument):
    """What is done to one model, how it is served, and what it must still be able to do; an absent step is not done.

    A `workload` is no part of what an attempt is: the recipes of a ladder have the sizes that were planned from it, in
    `engine`. Nor are `limits`, which are the run's.

    Example::

        name: mixed 6 bits
        calibrate: {samples: 32, length: 512}
        quantize: {format: mixed, effective_bits: 6}
        accept: {min_recovery: 0.95}
    """

    name: str = ""
    """A short name for tables; one made of the steps if absent."""
    calibrate: Calibration = Calibration()
    """The text that activations are measured on."""
    prune: Pruning | None = None
    """Which weights, blocks or parts of blocks go; none if absent."""
    distill: Distillation | None = None
    """What the pruned model learns from the unpruned one; it is not trained if absent."""
    quantize: Quantization | None = None
    """The formats of weights, activations and KV cache; 16 bits if absent."""
    engine: Engine = Engine()
    """How the artifact is served."""
    accept: Acceptance = Acceptance()
    """What the artifact must keep of the baseline."""
    workload: (
        Annotated[
            Annotated[Workload, Tag("stated")] | Annotated[Recorded, Tag("recorded")], Discriminator(kind)
        ]
        | None
    ) = None
    """What engines are sized for, stated or recorded; without one, sizes are those of `engine` or of the goal."""

    limits: Limits | None = None
    """What the run may spend before it ends with what it has; not limited if absent."""

    @model_validator(mode="after")
    def _learns_while_it_trains(self) -> Recipe:
        if isinstance(self.prune, MovementPruning) and self.distill is None:
            raise ValueError("prune.method: 'movement' prunes while training; add distill: {tokens: 1000000}")
        return self

    @model_validator(mode="after")
    def _sizes_are_planned_once(self) -> Recipe:
        stated = [name for name in SIZES if name in self.engine.model_fields_set]
        if self.workload and stated:
            raise ValueError(f"engine.{stated[0]}: is planned from the workload; remove one of the two")
        return self

    @model_validator(mode="before")
    @classmethod
    def _rounds_as_it_is_trained(cls, given: Any) -> Any:
        """What was trained with the nearest numbers is stored in them, where a format would find others."""
        quantize = given.get("quantize") if isinstance(given, dict) else None
        distill = given.get("distill") if isinstance(given, dict) else None
        aware = distill.get("quantization_aware") if isinstance(distill, dict) else None
        if aware is True and isinstance(quantize, dict) and quantize.get("format") in CALIBRATED_FORMATS:
            return {**given, "quantize": {"method": "nearest", **quantize}}
        return given

    @model_validator(mode="after")
    def _trains_with_a_rounding_that_can_be(self) -> Recipe:
        if not (self.distill and self.distill.quantization_aware):
            return self
        field, formats = "distill.quantization_aware: true", ", ".join(NEAREST_FORMATS)
        if self.quantize is None:
            raise ValueError(f"{field} needs a format; add quantize: {{format: int4_rtn}} (or {formats})")
        if self.quantize.format not in NEAREST_FORMATS:
            why = "is not rounded to nearest by the weights alone, and cannot be trained with"
            raise ValueError(f"{field}: format '{self.quantize.format}' {why}; write one of: {formats}")
        if self.quantize.needs_grams:
            raise ValueError(f"{field}: training rounds to the nearest numbers; add quantize.method: nearest")
        if self.quantize.scale_search == "mse" or self.quantize.exclude_sensitive:
            what = "exclude_sensitive" if self.quantize.exclude_sensitive else "scale_search: mse"
            raise ValueError(f"{field}: quantize.{what} is decided by what is measured after training; remove one")
        return self

    @property
    def weight_format(self) -> str:
        """The format that weights are stored in; bf16 where the recipe does not quantize."""
        return self.quantize.format if self.quantize else "bf16"

    @property
    def kv_cache_format(self) -> str:
        """The format of the KV cache; none, for 16 bits, where the recipe does not quantize."""
        return self.quantize.kv_cache if self.quantize else "none"

    @property
    def keeps_zeros(self) -> bool:
        """Whether distillation gets a sparse student, and must leave its zeros alone."""
        return isinstance(self.prune, SparsePruning)

    @property
    def title(self) -> str:
        """A short name for tables: the recipe's own, or one made of its steps."""
        return self.name or " + ".join(self._steps()) or "unchanged (bf16)"

    @property
    def digest(self) -> str:
        """The SHA-256 of what makes the artifact: not of the name, the workload, the budget, nor of what it is accepted
        for.

        Defaults are included, so a changed default changes the digest.
        """
        return digest(self.model_dump(mode="json", exclude={"name", "accept", "workload", "limits"}))

    def _steps(self) -> list[str]:
        steps = []
        if self.prune:
            steps.append(self.prune.title)
        if self.distill:
            aware = ", rounded" if self.distill.quantization_aware else ""
            steps.append(f"distill {self.distill.tokens:,} tokens{aware}")
        if self.quantize:
            bits = self.quantize.effective_bits
            plain = ", to nearest" if self.quantize.method and not self.distill else ""
            timed = f", {self.quantize.max_time:g} of the time" if self.quantize.max_time else ""
            kept = self.quantize.exclude_sensitive
            whole = f", {kept} groups in 16 bits" if kept else ""
            steps.append(self.quantize.format + (f" {bits:g} bits" if bits else "") + timed + plain + whole)
            if self.quantize.kv_cache != "none":
                steps.append(f"{self.quantize.kv_cache} KV")
        return steps
