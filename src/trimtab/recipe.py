"""The recipe: what is done to one model, in order, how it is served, and what it must still be able to do."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trimtab.schema import Document, digest

Ratio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

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


#: The most bytes of JSON that a recipe's `calibrate` may take: it travels in the state, which must stay small.
MAX_CALIBRATION_BYTES = 600


class Source(Document):
    """One source of calibration text, and its share of the samples.

    `text` is "builtin", the path of a .txt or .jsonl file, or a dataset: `hf:owner/name` on the Hugging Face hub,
    or `hf:` and a local folder. `config`, `split` and `field` (the column that holds text or messages) are those of
    a dataset. Samples are shared out in proportion to `weight`.
    """

    text: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def dataset(self) -> str | None:
        """What follows `hf:`, a name on the hub or a local folder; None for other sources."""
        return self.text.removeprefix("hf:") if self.text.startswith("hf:") else None

    @property
    def title(self) -> str:
        """The source in messages and tables, as 'hf:owner/name config train' or 'notes.txt'."""
        parts = (self.text, self.config, self.split) if self.dataset is not None else (self.text,)
        return " ".join(part for part in parts if part)

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"is a text without its field; write {{text: {value}}}")
        return value

    @model_validator(mode="after")
    def _columns_belong_to_datasets(self) -> Source:
        plain = (self.config, self.split, self.field) == (None, "train", "text")
        if self.dataset is None and not plain:
            raise ValueError("has config, split or field, which only a dataset has; write text: 'hf:owner/name'")
        return self


class Calibration(Document):
    """The data that activations are measured on: `samples` windows of `length` tokens.

    `text` is one source, written as the `text` of a `Source`, or a list of sources to mix.
    """

    samples: Count = 8
    length: Annotated[int, Field(ge=8)] = 512
    text: Annotated[
        Annotated[str, Tag("one")] | Annotated[tuple[Source, ...], Tag("mix")],
        Discriminator(lambda value: "mix" if isinstance(value, list | tuple | dict) else "one"),
    ] = "builtin"
    seed: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, in the order of the recipe; a single text is one of weight 1."""
        return (Source(text=self.text),) if isinstance(self.text, str) else self.text

    @model_validator(mode="after")
    def _sources_differ(self) -> Calibration:
        if not self.sources:
            raise ValueError("names no source of text; write text: builtin, or a list of sources")
        seen = set()
        for source in self.sources:
            if source.dataset == "":
                raise ValueError("names no dataset after 'hf:'; write hf:owner/name, or hf: and a folder")
            key = source.model_copy(update={"weight": 1.0})
            if key in seen:  # each would draw its windows without regard to the other's
                raise ValueError(f"names '{source.title}' twice; write it once, with a larger weight")
            seen.add(key)
        return self

    @model_validator(mode="after")
    def _travels_in_the_state(self) -> Calibration:
        size = len(self.to_json().encode())
        if size > MAX_CALIBRATION_BYTES:
            limit = f"{size} bytes as JSON, more than {MAX_CALIBRATION_BYTES}"
            raise ValueError(f"has {limit}; write fewer sources or shorter paths")
        return self


class SparsePruning(Document):
    """Zeroes weights of every linear layer inside the blocks (smaller when compressed, not faster).

    `magnitude` ranks them by themselves, `wanda` by what they meet as well, `sparsegpt` so that those left can make
    up for those that go. `pattern` says where: "unstructured" anywhere, "n:m" so that of each m weights along a row n
    stay; then the sparsity is the pattern's, and may be left out. `allocation` is how the sparsity, which is the mean,
    is shared out over the layers: the same for all, or less where a layer is more sensitive.
    """

    method: Literal["magnitude", "wanda", "sparsegpt"]
    pattern: str = "unstructured"
    sparsity: Ratio = Field(default=None, validate_default=True)
    allocation: Literal["uniform", "sensitivity"] = "uniform"

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


class DepthPruning(Document):
    """Removes whole transformer blocks, those that change their input least (smaller and faster).

    `contiguous` removes blocks that follow one another, the run whose influence has the least sum.
    """

    method: Literal["depth"]
    blocks: Count
    contiguous: bool = False

    @property
    def title(self) -> str:
        return f"-{self.blocks} blocks" + (" in a row" if self.contiguous else "")

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration is read: the influence of the blocks."""
        return True


class WidthPruning(Document):
    """Narrows every block alike, by what carries least (smaller and faster); at least one of three.

    `ffn` is the share of FFN neurons to remove, `hidden` that of hidden channels; what is kept of either is rounded
    to a multiple of 64, in a Llama also of its heads (`shapes.kept`). `kv_groups` counts KV heads to remove from every
    block, each with the attention heads that read it.
    """

    method: Literal["width"]
    ffn: Ratio | None = None
    kv_groups: Count | None = None
    hidden: Ratio | None = None

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


class MovementPruning(Document):
    """Zeroes weights while distillation trains: those whose learned scores are lowest in their layer (unstructured).

    `sparsity` is the share of zeros in the end. The soft variant has a `penalty` on the scores in its place, and
    finds the share. `magnitude_weight` is what a weight's size, over that of its layer, counts beside its score; the
    paper has 0. With `scores: magnitude` the smallest weights of the moment go: gradual magnitude pruning.

    Example::

        prune: {method: movement, sparsity: 0.85}
        distill: {tokens: 20000000}
    """

    method: Literal["movement"]
    sparsity: Ratio | None = None
    penalty: Annotated[float, Field(gt=0)] | None = None
    scores: Literal["movement", "magnitude"] = "movement"
    magnitude_weight: Annotated[float, Field(ge=0)] = 1.0
    score_learning_rate: Annotated[float, Field(gt=0)] = 1e-2

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


class Distillation(Document):
    """Trains the pruned model on the logits of the unpruned one.

    With `quantization_aware` it trains with its weights rounded as `quantize` will round them.

    A step is on `batch_size` windows of `length` tokens, computed in `gradient_accumulation` parts one after the
    other where memory is short, and by `processes` side by side, a GPU each. `loss` is KL(teacher ‖ student) or the
    reverse; `label_weight` mixes in the text itself, `hidden_weight` adds the error of the hidden states behind each
    block. The learning rate rises over the share `warmup` of the steps and then follows `schedule`.
    `early_stopping` is a number of measurements of the held-out loss, of twenty in all, without a better one.

    `text` is one source or a list of them: "builtin", .txt or .jsonl files. `generate` is a number of tokens by the
    teacher itself besides. `stored_logits` is how many of the teacher's likeliest tokens are stored for each position,
    once, so that no later run of the same text needs the teacher; 0 runs it beside the student.

    Example::

        distill: {tokens: 20000000, batch_size: 32, generate: 4000000, stored_logits: 64}
    """

    tokens: Count
    loss: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    batch_size: Count = 4
    gradient_accumulation: Count = 1
    processes: Count = 1
    length: Annotated[int, Field(ge=8)] = 256
    early_stopping: Annotated[int, Field(ge=0)] = 0
    text: Annotated[
        Annotated[str, Tag("one")] | Annotated[tuple[str, ...], Tag("mix")],
        Discriminator(lambda value: "mix" if isinstance(value, list | tuple) else "one"),
    ] = "builtin"
    generate: Annotated[int, Field(ge=0)] = 0
    stored_logits: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    quantization_aware: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The sources of text, in the order of the recipe."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @model_validator(mode="after")
    def _has_text(self) -> Distillation:
        if not self.texts and not self.generate:
            raise ValueError("has no text; write text: builtin, the path of a file, or generate: a number of tokens")
        return self

    @model_validator(mode="after")
    def _divides_its_batch(self) -> Distillation:
        parts = self.gradient_accumulation * self.processes
        if self.batch_size % parts:
            raise ValueError(
                f"has batch_size {self.batch_size}, which gradient_accumulation {self.gradient_accumulation} and "
                f"processes {self.processes} do not divide; write a multiple of {parts}"
            )
        return self

    @model_validator(mode="after")
    def _hidden_states_are_not_stored(self) -> Distillation:
        if self.hidden_weight and self.stored_logits:
            raise ValueError("has hidden_weight and stored_logits, but hidden states are not stored; remove one")
        return self


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


class Engine(Document):
    """How the artifact is served; lengths in tokens."""

    backend: Literal["torch", "trtllm", "trtllm-legacy", "vllm"] = "torch"
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    max_batch_size: Count = 8
    max_seq_len: Count = 2048
    max_num_tokens: Count = 8192
    kv_cache_fraction: Ratio = 0.9
    enable_chunked_prefill: bool = False


class Acceptance(Document):
    """What the artifact must keep of the baseline, and how sure one must be of it.

    `min_recovery` is a share of the baseline's accuracy above chance; `max_perplexity_ratio` is candidate
    over baseline on the same windows; `confidence` is one minus the probability of a false acceptance;
    `min_gain` is the relative improvement at the goal below which the artifact is useless.
    """

    min_recovery: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_perplexity_ratio: Annotated[float, Field(gt=1)] = 1.10
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    min_gain: Annotated[float, Field(ge=0)] = 0.02


class Recipe(Document):
    """What is done to one model; an absent step is not done.

    Example::

        name: mixed 6 bits
        quantize: {format: mixed, effective_bits: 6}
        accept: {min_recovery: 0.95}
    """

    name: str = ""
    calibrate: Calibration = Calibration()
    prune: Pruning | None = None
    distill: Distillation | None = None
    quantize: Quantization | None = None
    engine: Engine = Engine()
    accept: Acceptance = Acceptance()

    @model_validator(mode="after")
    def _learns_while_it_trains(self) -> Recipe:
        if isinstance(self.prune, MovementPruning) and self.distill is None:
            raise ValueError("prune.method: 'movement' prunes while training; add distill: {tokens: 1000000}")
        return self

    @model_validator(mode="after")
    def _rehearses_what_can_be(self) -> Recipe:
        if not (self.distill and self.distill.quantization_aware):
            return self
        field, formats = "distill.quantization_aware: true", ", ".join(NEAREST_FORMATS)
        if self.quantize is None:
            raise ValueError(f"{field} needs a format; add quantize: {{format: int4_rtn}} (or {formats})")
        if self.quantize.format not in NEAREST_FORMATS:
            why = "is not rounded to nearest by the weights alone, and cannot be trained with"
            raise ValueError(f"{field}: format '{self.quantize.format}' {why}; write one of: {formats}")
        if self.quantize.scale_search == "mse" or self.quantize.exclude_sensitive:
            what = "exclude_sensitive" if self.quantize.exclude_sensitive else "scale_search: mse"
            raise ValueError(f"{field}: quantize.{what} is decided by what is measured after training; remove one")
        return self

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
        """The SHA-256 of what makes the artifact: not of the name, nor of what it is accepted for.

        Defaults are included, so a changed default changes the digest.
        """
        return digest(self.model_dump(mode="json", exclude={"name", "accept"}))

    def _steps(self) -> list[str]:
        steps = []
        if self.prune:
            steps.append(self.prune.title)
        if self.distill:
            aware = ", rounded" if self.distill.quantization_aware else ""
            steps.append(f"distill {self.distill.tokens:,} tokens{aware}")
        if self.quantize:
            bits = self.quantize.effective_bits
            steps.append(self.quantize.format + (f" {bits:g} bits" if bits else ""))
            if self.quantize.kv_cache != "none":
                steps.append(f"{self.quantize.kv_cache} KV")
        return steps
