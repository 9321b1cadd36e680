"""The section `prune`: which weights, blocks or parts of blocks go."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.base.user_document import UserDocument
from trimtab.recipe.fields import Count, Ratio


class SparsePruning(UserDocument):
    """Zeroes weights of every linear layer inside the blocks (smaller when compressed, not faster)."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    """How weights are ranked: `magnitude` by themselves, `wanda` by what they meet as well, `sparsegpt` so that those
    left can make up for those that go."""
    pattern: str = "unstructured"
    """Where zeros are: "unstructured" anywhere, "n:m" (as "2:4") so that of each m weights along a row n stay."""
    sparsity: Ratio = Field(default=None, validate_default=True)
    """The share of weights that become zero, the mean over the layers; may be left out where the pattern says it."""
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    """How the sparsity is shared out over the layers: the same for all, or less where a layer is more sensitive."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _is_a_pattern(cls, value: Any) -> Any:
        if isinstance(value, int) and value >= 60:
            written = f"{value // 60}:{value % 60}"
            raise ValueError(f"is how YAML reads {written} without quotes; write '{written}'")
        if value == "unstructured":
            return value
        counts = _counts(value)
        if not counts or counts[0] < 1:
            raise ValueError("is no pattern; write 'unstructured', or n:m in quotes, as '2:4'")
        if counts[0] >= counts[1]:
            raise ValueError(f"keeps {counts[0]} of each {counts[1]} weights, so it zeroes none; write '2:4' or '4:8'")
        return f"{counts[0]}:{counts[1]}"

    @field_validator("sparsity", mode="before")
    @classmethod
    def _is_that_of_the_pattern(cls, value: Any, info: ValidationInfo) -> Any:
        counts = _counts(info.data.get("pattern"))
        if value is None and "pattern" not in info.data:
            return 0.5  # the pattern was refused, and says what is wrong
        if value is None and not counts:
            raise PydanticCustomError("missing", "is required")
        if not counts:
            return value
        share = 1 - counts[0] / counts[1]
        if value is not None and not (isinstance(value, int | float) and abs(value - share) < 1e-3):
            raise ValueError(f"is not what '{info.data['pattern']}' zeroes, {share:.4g}; leave it out, or the pattern")
        return share

    @field_validator("allocation")
    @classmethod
    def _is_free_to_differ(cls, value: str, info: ValidationInfo) -> str:
        if value != "uniform" and _counts(info.data.get("pattern")):
            raise ValueError(f"shares out what '{info.data['pattern']}' fixes for every layer; write 'uniform'")
        return value

    @property
    def n_m(self) -> tuple[int, int] | None:
        """How many weights of how many stay, or None where they may stay anywhere."""
        return _counts(self.pattern)

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is decided by what calibration measured of the activations."""
        return self.method != "magnitude" or self.allocation == "sensitivity"

    @property
    def title(self) -> str:
        """The pruning in tables, as 'wanda 50 %' or 'sparsegpt 2:4'."""
        amount = self.pattern if self.n_m else f"{100 * self.sparsity:g} %"
        return f"{self.method} {amount}" + (" by sensitivity" if self.allocation == "sensitivity" else "")


def _counts(pattern: Any) -> tuple[int, int] | None:
    """The n and m of a pattern "n:m", else None."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern) if isinstance(pattern, str) else None
    return (int(match[1]), int(match[2])) if match else None


class DepthPruning(UserDocument):
    """Removes whole transformer blocks, those that change their input least (smaller and faster)."""

    method: Literal["depth"]
    """Whole blocks go."""
    blocks: Count
    """How many blocks are removed."""
    contiguous: bool = False
    """Removes blocks that follow one another, the run whose influence has the least sum."""

    @property
    def title(self) -> str:
        return f"-{self.blocks} blocks" + (" in a row" if self.contiguous else "")

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration is read: the influence of the blocks."""
        return True


class WidthPruning(UserDocument):
    """Narrows every block alike, by what carries least (smaller and faster); at least one of three."""

    method: Literal["width"]
    """Parts of every block go."""
    ffn: Ratio | None = None
    """The share of FFN neurons to remove; what is kept is rounded to a multiple of 64 (`shapes.kept`)."""
    kv_groups: Count | None = None
    """KV heads to remove from every block, each with the attention heads that read it."""
    hidden: Ratio | None = None
    """The share of hidden channels to remove; what is kept is rounded to a multiple of 64, in a Llama also of its heads
    (`shapes.kept`)."""

    @model_validator(mode="after")
    def _removes_something(self) -> WidthPruning:
        if not (self.ffn or self.kv_groups or self.hidden):
            raise ValueError("has method 'width' and nothing to remove; write ffn, kv_groups or hidden")
        return self

    @property
    def title(self) -> str:
        neurons = self.ffn and f"-{100 * self.ffn:.3g} % FFN"
        groups = self.kv_groups and f"-{self.kv_groups} KV group{'s' * (self.kv_groups > 1)}"
        channels = self.hidden and f"-{100 * self.hidden:.3g} % hidden"
        return ", ".join(filter(None, (neurons, groups, channels)))

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration is read: what neurons, heads and channels carry."""
        return True


class MovementPruning(UserDocument):
    """Zeroes weights while distillation trains: those whose learned scores are lowest in their layer (unstructured).

    Example::

        prune: {method: movement, sparsity: 0.85}
        distill: {tokens: 20000000}
    """

    method: Literal["movement"]
    """Weights go while distillation trains."""
    sparsity: Ratio | None = None
    """The share of weights that are zero in the end; write it or `penalty`."""
    penalty: Annotated[float, Field(gt=0)] | None = None
    """The soft variant: a penalty on the scores, which finds the share of zeros itself; write it or `sparsity`."""
    scores: Literal["movement", "magnitude"] = "movement"
    """What goes: the lowest learned scores, or the smallest weights of the moment, which is gradual magnitude
    pruning."""
    magnitude_weight: Annotated[float, Field(ge=0)] = 1.0
    """What a weight's size times its input's, over that of its layer, counts beside its score; the paper has 0."""
    score_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """The learning rate of the scores."""

    @model_validator(mode="after")
    def _is_hard_or_soft(self) -> MovementPruning:
        if (self.sparsity is None) == (self.penalty is None):
            found = "neither sparsity nor penalty" if self.sparsity is None else "sparsity and penalty"
            raise ValueError(f"has {found}; write one: sparsity, the share of zeros, or penalty, for the soft variant")
        if self.penalty and self.scores == "magnitude":
            raise ValueError("has scores 'magnitude', which are not learned, and a penalty on them; write sparsity")
        return self

    @property
    def title(self) -> str:
        kind = "gradual magnitude" if self.scores == "magnitude" else "movement"
        return f"{kind} {100 * self.sparsity:.3g} %" if self.sparsity else "soft movement"

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration is read: no, training shows what moves."""
        return False


Pruning = Annotated[SparsePruning | MovementPruning | DepthPruning | WidthPruning, Field(discriminator="method")]
