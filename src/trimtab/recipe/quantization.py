"""The section `quantize`: the formats of weights, activations and KV cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trimtab.schema import Document

#: Formats of weights and activations, by the names of the recipe.
Format = Literal[
    "fp32", "fp16", "bf16", "int8_wo", "int8_sq", "fp8", "fp8_per_channel",
    "int4_rtn", "int4_awq", "int4_gptq", "w4a8_awq", "nvfp4", "mxfp4", "mixed",
]  # fmt: skip
#: Formats of the KV cache; "none" leaves it in 16 bits.
KVCache = Literal["none", "fp8", "int8", "nvfp4"]
#: Formats that only change the type of the numbers.
CASTS = ("fp32", "fp16", "bf16")
#: Formats in which `group_size` weights of a row share a scale.
GROUPED_FORMATS = ("int4_rtn", "int4_awq", "int4_gptq", "w4a8_awq", "mixed")
#: Formats without scales that a search could better: none at all, or blocks' whose numbers are ModelOpt's.
_UNSEARCHED = (*CASTS, "nvfp4", "mxfp4")
#: What `mixed` gives each layer one of.
MIXED_FORMATS = ("int4_gptq", "int8_wo")
#: Formats that AWQ scales the inputs of, and whose weight scales are searched.
AWQ_FORMATS = ("int4_awq", "int4_gptq", "w4a8_awq")
#: Formats that round activations too, to scales that calibration sets.
STATIC_ACTIVATIONS = ("int8_sq", "fp8", "w4a8_awq", "nvfp4", "mxfp4")
#: Formats whose weights are rounded to nearest with scales of their own: what training can rehearse.
NEAREST_FORMATS = ("int8_wo", "int4_rtn", "fp8", "fp8_per_channel", "nvfp4", "mxfp4")


class Quantization(Document):
    """The precision of weights, activations and KV cache.

    `group_size` counts the weights of one row that share a scale (INT4 formats). `effective_bits` is the
    mean over the weights that are quantized, for `mixed`, which gives each layer one of `MIXED_FORMATS`.
    `kv_cache` is one scale a layer for keys and one for values (`fp8`, `int8`), or, in `nvfp4`, four bits and a
    scale for each 16 numbers of a head besides. `scale_search` says where weight scales come from: `max`, the
    largest weight, or `mse`, a search for the least error at the calibrated inputs; the default is the format's
    own. `exclude` names modules, with shell wildcards, that stay in 16 bits, and so do as many groups of layers as
    `exclude_sensitive` says, those that the format harms most.
    """

    format: Format
    group_size: Literal[32, 64, 128] = 64
    effective_bits: Annotated[float, Field(ge=4, le=8)] | None = None
    scale_search: Literal["max", "mse"] | None = None
    kv_cache: KVCache = "none"
    exclude: tuple[str, ...] = ("lm_head",)
    exclude_sensitive: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _bits_belong_to_mixed(self) -> Quantization:
        if self.format == "mixed" and self.effective_bits is None:
            raise ValueError("has format 'mixed' and no effective_bits; write effective_bits: 4 to 8")
        if self.format != "mixed" and self.effective_bits is not None:
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
    def needs_statistics(self) -> bool:
        """Whether anything is set by what calibration measured of the activations."""
        aware = self.format in (*AWQ_FORMATS, *STATIC_ACTIVATIONS)
        return aware or self.scale_search == "mse" or self.kv_cache != "none" or self.needs_sensitivity

    @property
    def needs_grams(self) -> bool:
        """Whether GPTQ is part of it, which wants the full second moments."""
        return "int4_gptq" in self.layer_formats

    @property
    def needs_sensitivity(self) -> bool:
        """Whether layers are treated by how much the format harms them."""
        return self.format == "mixed" or self.exclude_sensitive > 0

    @property
    def layer_formats(self) -> tuple[str, ...]:
        """The formats that a quantized layer may have."""
        return MIXED_FORMATS if self.format == "mixed" else (self.format,)

    def searches_scales(self, format: str) -> bool:
        """Whether the weight scales of a format, of which `mixed` has two, are searched."""
        if self.scale_search:
            return self.scale_search == "mse"
        return format in AWQ_FORMATS
