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
#: Formats whose weights may be rounded to nearest with scales of their own: what training can round in each step.
NEAREST_FORMATS = _those(lambda row: row.has_plain_rounding)
#: Of these, those that are rounded otherwise where nobody asks for it.
CALIBRATED_FORMATS = _those(
    lambda row: row.has_plain_rounding and (row.channels != "" or row.rounding != "nearest")
)
#: What the format that mixes on a CPU gives each layer one of.
MIXED_FORMATS = FORMATS["mixed"].mixes
#: Calibration tokens from which GPTQ is sequential, and trusts their second moments more than it does fewer. With as
#: many, SmolLM2-135M's perplexity was 31.13 in order and 31.68 at once in INT4, 34.10 and 34.53 in NVFP4, 30.46 and
#: 30.77 in NVFP4 weights, 31.35 and 32.64 in MXFP4 weights (three seeds, one H200); with 4,096 it was none the better.
MANY_TOKENS = 1 << 15
#: The default of `asymmetry`, the best of those that were tried on SmolLM2-135M: 0.25, 0.5 and 1.
ASYMMETRY = 0.5
#: The default of `sweeps` with sequential GPTQ. With inputs that correlate the first took 2.2 % of INT4's squared error
#: and 4.5 % of NVFP4's, the second 0.5 and 1.1 %, two more 0.4 and 0.7 %.
SWEEPS = 2


class Quantization(UserDocument):
    """The precision of weights, activations and KV cache."""

    format: Format
    """The format of weights and activations; `mixed` and its like give each layer one of several by what it can bear:
    `mixed` INT4 or INT8, `mixed_gpu` four bits, FP8 or 16, `mixed_fp4` the same with FP4 activations."""
    group_size: Literal[32, 64, 128] = 64
    """How many weights of one row share a scale, in the INT4 formats."""
    effective_bits: Annotated[float, Field(ge=4, le=8)] | None = None
    """For formats that mix alone, which need it: mean bits of the weights, without their scales."""
    max_time: Annotated[float, Field(gt=0, le=1)] | None = None
    """For formats that mix: the most time that their layers may take, as a share of what they take in 16 bits, by
    `trimtab.catalog.layer_times`; time is no object if absent."""
    step_tokens: Annotated[int, Field(ge=1)] = 1
    """With `max_time`: the tokens of a step whose time is meant, 1 for decoding one sequence."""
    method: Literal["nearest"] | None = None
    """How the numbers of an FP4 format are found: `nearest` takes the nearest ones under scales from the largest
    weight, as training with them does; by calibration if absent."""
    scale_search: Literal["max", "mse"] | None = None
    """Where scales of weights come from: `max`, the largest weight, or `mse`, a search for the least error at the
    calibrated inputs; the format's own way if absent."""
    sequential: bool | None = None
    """For formats with GPTQ: whether a layer is rounded for the inputs that it gets from the layers rounded before it,
    and not for those that it gets in the source, which on a CPU takes some five times as long. If absent, from 32,768
    calibration tokens on: with so many every format loses less, with a few thousand none does."""
    asymmetry: Annotated[float, Field(ge=0, le=1)] = ASYMMETRY
    """With `sequential`: the part of what a layer's output lacks, because its inputs have changed, that its weights are
    moved to make up for before they are rounded; 0 moves none."""
    damping: Annotated[float, Field(gt=0, le=10)] | None = None
    """For formats with GPTQ: what is added to the diagonal of a layer's Gram matrix, as a share of its mean; more
    trusts calibration less. If absent 0.3 up to 32,768 tokens, and less with more, down to 0.05."""
    sweeps: Annotated[int, Field(ge=0, le=20)] | None = None
    """For formats with GPTQ: how often it goes through a layer's weights and scales once more, each taking the value
    that is best given all others. If absent 2 with `sequential`, else 0."""
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
        if self.max_time and not self.row.mixes:
            raise ValueError("has max_time, which only formats that mix have; remove it, or write format: mixed_gpu")
        if self.exclude_sensitive and self.row.keeps_plain:
            raise ValueError(
                f"has exclude_sensitive, but format '{self.format}' chooses itself what stays in 16 bits; remove it, "
                "or write more effective_bits"
            )
        return self

    @model_validator(mode="after")
    def _searches_what_is_there(self) -> Quantization:
        if self.scale_search == "mse" and self.format in CASTS:
            raise ValueError(f"has scale_search 'mse', but format '{self.format}' has no scales to search; remove it")
        return self

    @model_validator(mode="after")
    def _has_another_method(self) -> Quantization:
        if self.method and self.format not in CALIBRATED_FORMATS:
            other = "write format: int4_rtn" if self.row.is_four_bit_weight_only else "remove it"
            raise ValueError(f"has method 'nearest', which format '{self.format}' has no choice of; {other}")
        if self.method and self.scale_search == "mse":
            raise ValueError("has method 'nearest' and scale_search 'mse', which is another; remove one")
        return self

    @model_validator(mode="after")
    def _gptq_has_what_is_its_own(self) -> Quantization:
        is_given = {
            "sequential": self.sequential is not None,
            "damping": self.damping is not None,
            "sweeps": self.sweeps is not None,
            "asymmetry": self.asymmetry != ASYMMETRY,
        }
        own = [name for name, given in is_given.items() if given]
        if own and not self.needs_grams:
            names = ", ".join(name for name, row in FORMATS.items() if any(p.rounding == "gptq" for p in row.parts))
            raise ValueError(f"has {own[0]}, and format '{self.format}' has no GPTQ; remove it (with GPTQ: {names})")
        if is_given["asymmetry"] and self.sequential is False:
            raise ValueError("has asymmetry, which only sequential GPTQ has; remove it, or write sequential: true")
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
            any(map(self.has_static_inputs, self.layer_formats))
            or any(self.channels(form) or self.searches_scales(form) for form in self.layer_formats)
            or self.kv_cache != "none"
            or self.needs_grams
            or self.needs_sensitivity
        )

    @property
    def needs_grams(self) -> bool:
        """Whether GPTQ is part of it, which wants the full second moments."""
        return any(self.rounding(form) == "gptq" for form in self.layer_formats)

    def is_sequential(self, tokens: int) -> bool:
        """Whether GPTQ sees the model as it is quantized so far, with so many calibration tokens."""
        return self.needs_grams and (tokens >= MANY_TOKENS if self.sequential is None else self.sequential)

    def follows_dense(self, tokens: int) -> bool:
        """Whether the dense model runs beside that one, for the part of the outputs that is made up for."""
        return self.is_sequential(tokens) and self.asymmetry > 0

    def sweeps_with(self, tokens: int) -> int:
        """How often GPTQ, with so many calibration tokens, goes through all weights once more."""
        return (SWEEPS if self.is_sequential(tokens) else 0) if self.sweeps is None else self.sweeps

    @property
    def needs_sensitivity(self) -> bool:
        """Whether layers are treated by how much the format harms them."""
        return bool(self.row.mixes) or self.exclude_sensitive > 0

    @property
    def layer_formats(self) -> tuple[str, ...]:
        """The formats that a quantized layer may have; a cast, which quantizes none, names itself."""
        return self.row.mixes or (self.format,)

    def channels(self, format: str) -> str:
        """Returns what finds the channel scales of layers in one of `layer_formats`, "" for none."""
        return "" if self.method else FORMATS[format].channels

    def rounding(self, format: str) -> str:
        """Returns how the numbers of layers in one of `layer_formats` are found."""
        return self.method or FORMATS[format].rounding

    def searches_scales(self, format: str) -> bool:
        """Whether the weight scales of one of `layer_formats` are searched."""
        if self.scale_search or self.method:
            return self.scale_search == "mse"
        row = FORMATS[format]
        return row.channels == "awq" or (row.storage is not None and row.storage.scale == "block")

    def has_static_inputs(self, format: str) -> bool:
        """Whether layers in one of `layer_formats` round their input at a scale that calibration sets."""
        storage = FORMATS[format].storage
        return storage is not None and storage.inputs is not None and storage.inputs.scale == "static"
