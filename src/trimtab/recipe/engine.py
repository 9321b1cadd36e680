"""The section `engine`: how the artifact is served."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_serializer, model_validator

from trimtab.base.errors import InputError
from trimtab.base.user_document import UserDocument
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.contracts import version as tensorrt_llm
from trimtab.recipe.fields import Count, Ratio

#: Fields of `Engine` that are written down only where they differ from their defaults.
_LATER = (
    "tensorrt_llm", "by_block", "kv_cache_tokens", "tokens_per_block", "enable_block_reuse", "scheduler_policy",
)  # fmt: skip

#: Fields of `Engine` that are planned from a workload.
SIZES = (
    "tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_seq_len", "max_num_tokens",
    "kv_cache_fraction", "kv_cache_tokens", "enable_chunked_prefill",
)  # fmt: skip


class Engine(UserDocument):
    """How the artifact is served."""

    backend: Literal[tuple(BACKENDS)] = "torch"
    """What serves: torch is embedded, trtllm is TensorRT-LLM's LLM API, trtllm-legacy its engine builder, vllm is
    vLLM."""
    tensorrt_llm: str | None = None
    """The version of TensorRT-LLM that serves, as "1.2.1"; the image's own if absent. Given without a back end, it
    chooses the one that this version has."""
    by_block: bool = False
    """Holds one block of the model at a time, and says likelihoods alone: so a plan measures an unchanged model that no
    devices of its target hold. No recipe writes it."""
    tensor_parallel_size: Count = 1
    """Devices that share each layer of one copy of the model."""
    pipeline_parallel_size: Count = 1
    """Stages of consecutive layers, each on devices of its own."""
    max_batch_size: Count = 8
    """The most requests that are answered at a time."""
    max_seq_len: Count = 2048
    """Tokens of the longest request with its answer."""
    max_num_tokens: Count = 8192
    """The most tokens of one step, over all requests in it."""
    kv_cache_fraction: Ratio = 0.9
    """The share of what weights and activations leave free that the KV cache gets."""
    kv_cache_tokens: Count | None = None
    """Tokens that the KV cache must hold; the largest batch at full length if absent."""
    enable_chunked_prefill: bool = False
    """Reads a long prompt in parts, so that it delays the others less."""
    tokens_per_block: Literal[16, 32, 64, 128] = 32
    """Tokens of one block of a paged KV cache, which the torch engine does not have."""
    enable_block_reuse: bool = True
    """Keeps the blocks of beginnings that requests share; the torch engine has none."""
    scheduler_policy: Literal["guaranteed_no_evict", "max_utilization", "static_batch"] = "guaranteed_no_evict"
    """When a request joins the running batch: when all it may ever need is there, when its prompt fits (others may be
    paused later), or when the whole batch before it is done."""

    @property
    def world_size(self) -> int:
        """The devices that serve one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def longest_request(self) -> int:
        """The most tokens of a prompt and its given answer that the back end scores in one piece.

        vLLM generates a token besides, for which it needs room.
        """
        return min(self.max_seq_len, self.max_num_tokens) - (self.backend == "vllm")

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, handler: Any) -> dict[str, Any]:
        # Recipes from before these fields keep their digests, and the results of their stages are found.
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if k not in _LATER or v != fields[k].default}

    @model_validator(mode="before")
    @classmethod
    def _version_chooses_the_back_end(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value.get("tensorrt_llm") or "backend" in value:
            return value
        try:
            found = tensorrt_llm.backends(str(value["tensorrt_llm"]))
        except InputError:
            return value  # the field itself says what is wrong with it
        return {**value, "backend": found[0]} if found else value

    @field_validator("tensorrt_llm")
    @classmethod
    def _is_a_version(cls, value: str | None) -> str | None:
        try:
            return value and str(tensorrt_llm.parse(value))
        except InputError as error:
            raise ValueError(str(error).partition(" ")[2]) from None

    @model_validator(mode="after")
    def _version_has_the_back_end(self) -> Engine:
        if self.tensorrt_llm and self.backend not in tensorrt_llm.RANGES:
            raise ValueError(
                f"has tensorrt_llm {self.tensorrt_llm}, which back end '{self.backend}' does not need; remove it, or "
                f"write backend: {' or '.join(tensorrt_llm.backends(self.tensorrt_llm)) or 'trtllm'}"
            )
        if self.tensorrt_llm and (reason := tensorrt_llm.refusal(self.backend, self.tensorrt_llm)):
            raise ValueError(f"cannot be: {reason}")
        return self
