"""The section `quantize`: the formats of weights, activations and KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trimtab.base.user_document import UserDocument
from trimtab.catalog.formats import FORMATS, WeightFormat
from trimtab.catalog.kv_caches import KV_CACHES

#: Formats of weights and activations, by the names of the recipe.
Format = Literal[tuple(FORMATS)]
#: Formats of the KV cache; "none" leaves it in 16 bits.
KVCache = Literal[tuple(KV_CACHES)]


def _those(has: Callable[[WeightFormat], bool]) -> tuple[str, ...]:
    return tuple(name for name, row in FORMATS.items() if has(row))


#: Formats that only change the type of the numbers.
CASTS = _those(lambda row: row.is_cast)
#: Formats in which `group_size` weights of a row share a scale.
GROUPED_FORMATS = _those(lambda row: any(part.storage.scale == "group" for part in row.parts))
#: Formats without scales that a search could better: none at all, or blocks' whose numbers are ModelOpt's.
_UNSEARCHED = _those(lambda row: all(part.storage.scale == "block" for part in row.parts))
#: Formats whose weights are rounded to nearest with scales of their own: what training can round in each step.
NEAREST_FORMATS = _those(lambda row: bool(row.storage) and not row.channels and row.rounding == "nearest")
#: What the format that mixes gives each layer one of.
MIXED_FORMATS = next(row.mixes for row in FORMATS.values() if row.mixes)


class Quantization(UserDocument):
    """The precision of weights, activations and KV cache."""

    format: Format
    """The format of weights and activations; `mixed` gives each layer one of two by what the layer can bear."""
    group_size: Literal[32, 64, 128] = 64
    """How many weights of one row share a scale, in the INT4 formats."""
    effective_bits: Annotated[float, Field(ge=4, le=8)] | None = None
    """For `mixed` alone, which needs it: mean bits of the weights that are quantized."""
    scale_search: Literal["max", "mse"] | None = None
    """Where scales of weights come from: `max`, the largest weight, or `mse`, a search for the least error at the
    calibrated inputs; the format's own way if absent."""
    kv_cache: KVCache = "none"
    """The format of the KV cache: one scale a layer for keys and one for values (fp8, int8), or four bits and a scale
    for each 16 numbers of a head besides (nvfp4); none leaves it in 16 bits."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Modules that stay in 16 bits, by name, with shell wildcards."""
    exclude_sensitive: Annotated[int, Field(ge=0)] = 0
    """How many groups of layers stay in 16 bits besides, those that the format harms most."""

    @model_validator(mode="after")
    def _bits_belong_to_mixed(self) -> Quantization:
        if self.row.mixes and self.effective_bits is None:
            raise ValueError(f"has format '{self.format}' and no effective_bits; write effective_bits: 4 to 8")
        if not self.row.mixes and self.effective_bits is not None:
            raise ValueError("has effective_bits, which only format 'mixed' has; remove it, or write format: mixed")
        return self

    @model_validator(mode="after")
    def _searches_what_is_there(self) -> Quantization:
        if self.scale_search == "mse" and self.format in _UNSEARCHED:
            raise ValueError(f"has scale_search 'mse', but format '{self.format}' has no scales to search; remove it")
        return self

    @model_validator(mode="after")
    def _excludes_what_is_quantized(self) -> Quantization:
        if self.exclude_sensitive and self.format in CASTS:
            raise ValueError(f"has exclude_sensitive, but format '{self.format}' quantizes no layer; remove it")
        return self

    @property
    def row(self) -> WeightFormat:
        """What the catalog says of the format."""
        return FORMATS[self.format]

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is set by what calibration measured of the activations."""
        return (
            self.row.is_calibrated
            or self.scale_search == "mse"
            or self.kv_cache != "none"
            or self.needs_sensitivity
        )

    @property
    def needs_grams(self) -> bool:
        """Whether GPTQ is part of it, which wants the full second moments."""
        return any(part.rounding == "gptq" for part in self.row.parts)

    @property
    def needs_sensitivity(self) -> bool:
        """Whether layers are treated by how much the format harms them."""
        return bool(self.row.mixes) or self.exclude_sensitive > 0

    @property
    def layer_formats(self) -> tuple[str, ...]:
        """The formats that a quantized layer may have; a cast, which quantizes none, names itself."""
        return self.row.mixes or (self.format,)

    def searches_scales(self, format: str) -> bool:
        """Whether the weight scales of a format, of which `mixed` has two, are searched."""
        if self.scale_search:
            return self.scale_search == "mse"
        return FORMATS[format].channels == "awq"
