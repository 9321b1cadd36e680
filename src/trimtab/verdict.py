"""The verdict: (to be completed by its author) types that state.py and the report rely on."""
from __future__ import annotations
from typing import Literal
from trimtab.schema import Document

FailureClass = Literal["accuracy", "kv_cache_accuracy", "perplexity", "no_gain", "export_damaged",
                       "degenerate_output", "does_not_fit", "unsupported", "training_diverged"]
FAILURE_CLASSES: tuple[str, ...] = FailureClass.__args__

class Interval(Document):
    estimate: float
    low: float
    high: float

class Measurements(Document):
    """bytes of the artifact; bytes of quantized tensors over their BF16 bytes; tokens/s; bytes; …"""
    bytes: int = 0
    quantized_share: float = 1.0
    decode_tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    max_context_tokens: int = 0

class Verdict(Document):
    outcome: Literal["accepted", "rejected", "indeterminate", "baseline"]
    failure_class: FailureClass | None = None
    reason: str
    looks: int = 0
    items: int = 0
    windows: int = 0
    accuracy: Interval | None = None
    recovery: Interval | None = None
    perplexity: float | None = None
    perplexity_ratio: Interval | None = None
    mcnemar_p: float | None = None
    gain: float | None = None
    confirmed: bool = False
    measurements: Measurements = Measurements()
