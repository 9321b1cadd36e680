"""The formats of the KV cache, as rows. "none", 16 bits, is one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.catalog.backends import LAST, Range
from trimtab.catalog.numbers import NUMBERS


@dataclass(frozen=True)
class KVCacheFormat:
    """One format of keys and values.

    Attributes:
        name: as a recipe's `quantize.kv_cache` has it.
        algorithm: ModelOpt's `kv_cache_quant_algo`; None for 16 bits.
        numbers: the type of the stored numbers, of `numbers.NUMBERS`; "" for 16 bits.
        block: numbers of a head that share a one-byte scale besides the layer's; 0 where the layer's is the only one.
        largest: what calibration's largest key or value of a layer becomes in units of the layer's scale.
        scheme: what ModelOpt writes of it in config.json, as type and bits; None where it writes the algorithm's name.
        scale_is_optional: whether a scale that is missing means 1, as TensorRT-LLM takes it.
        harshness: its place in the order of how much a KV cache takes away, which is also how much it saves.
        served: back end -> the compute capabilities, first and last, that serve it.
    """

    name: str
    algorithm: str | None = None
    numbers: str = ""
    block: int = 0
    largest: float = 0.0
    scheme: tuple[str, int] | None = None
    scale_is_optional: bool = False
    harshness: int = 0
    served: Mapping[str, Range] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        """Bytes of one number, with the scale of its block."""
        if not self.numbers:
            return 2.0
        return NUMBERS[self.numbers].bits / 8 + (1 / self.block if self.block else 0)


#: By name. What is served where: the matrix of TensorRT-LLM's docs/source/features/quantization.md, whose PyTorch back
#: end serves FP8 on Ampere too and whose KvCacheConfig has no INT8; NVFP4 is that of 10.0 and 10.3, and consumer
#: Blackwell (12.0) has none (TensorRT-LLM issue #10241). `torch` rounds keys and values where attention reads them and
#: stores them in 16 bits, on every device. NVFP4's `largest` is ModelOpt's own, which current TensorRT-LLM reads: the
#: blocks' scales, a sixth of their largest value, then use e4m3 up to a sixth of its range.
KV_CACHES = {
    row.name: row
    for row in (
        KVCacheFormat("none"),
        KVCacheFormat(
            "fp8", "FP8", "e4m3", largest=448, scheme=("float", 8), scale_is_optional=True, harshness=1,
            served={"trtllm": ((8, 0), LAST), "trtllm-legacy": ((8, 9), LAST), "vllm": ((8, 9), LAST)},
        ),
        KVCacheFormat(
            "int8", "INT8", "int8", largest=127, harshness=1, served={"trtllm-legacy": ((8, 0), (9, 0))}
        ),
        KVCacheFormat(
            "nvfp4", "NVFP4", "e2m1", block=16, largest=448, harshness=2, served={"trtllm": ((10, 0), (10, 3))}
        ),
    )
}  # fmt: skip
#: By ModelOpt's name.
BY_ALGORITHM = {row.algorithm: row for row in KV_CACHES.values() if row.algorithm}


def of_scheme(scheme: Any) -> str | None:
    """Returns ModelOpt's name of the format that a `kv_cache_scheme` of config.json describes, or None."""
    told = (scheme.get("type"), scheme.get("num_bits")) if isinstance(scheme, dict) else None
    return next((row.algorithm for row in KV_CACHES.values() if row.scheme and row.scheme == told), None)
