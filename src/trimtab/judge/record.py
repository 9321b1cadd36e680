"""What is said of one attempt: the outcome, why it fell short, and the numbers that this rests on."""

from __future__ import annotations

from typing import Literal

from trimtab.base.schema import Document
from trimtab.judge.damage import Damage
from trimtab.judge.power import Power
from trimtab.judge.statistics import Interval

FailureClass = Literal[
    "accuracy",
    "kv_cache_accuracy",
    "perplexity",
    "no_gain",
    "export_damaged",
    "degenerate_output",
    "does_not_fit",
    "unsupported",
    "training_diverged",
]
FAILURE_CLASSES: tuple[str, ...] = FailureClass.__args__
#: The classes that a quantized KV cache may be the cause of, and that judging it apart can tell.
KV_CACHE_SUSPECT = ("accuracy", "perplexity")


class Measurements(Document):
    """What the engine cost; 0 means not measured.

    `bytes` of the artifact's files; `quantized_share` is the bytes of the quantized tensors over their bytes
    in BF16; decode at batch 1 and throughput at `batch` sequences at a time, in tokens a second; the peak memory in
    bytes; the longest context that fits, in tokens. All are those of one copy of the model, on `devices` of the
    target, or on `cores` of a CPU. Of a model that was scored `by_block`, which serves nobody, neither speed nor memory
    is measured.
    """

    bytes: int = 0
    quantized_share: float = 1.0
    decode_tokens_per_second: float = 0.0
    throughput_tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    max_context_tokens: int = 0
    devices: int = 1
    batch: int = 8
    cores: int = 0
    by_block: bool = False

    @property
    def device_seconds_per_million_tokens(self) -> float:
        """What a million tokens of answers takes of a device at `batch`; 0 where throughput was not measured."""
        speed = self.throughput_tokens_per_second
        return 1e6 * self.devices / speed if speed else 0.0


class Confirmation(Document):
    """What fresh items said of an accepted attempt; interval ends have one-sided confidence `level`."""

    items: int
    windows: int
    level: float
    recovery: Interval | None = None
    perplexity_ratio: Interval | None = None


class Beside(Document):
    """The unchanged model beside an attempt: on the same items and windows, and, where the gain was asked for, with the
    measurements that it was computed from. A speed that decides is measured in turn with the attempt's."""

    accuracy: Interval | None = None
    perplexity: float | None = None
    measurements: Measurements | None = None


class Verdict(Document):
    """What is said of one attempt, and the numbers it rests on.

    `stage` is the one that failed, where the attempt ended before it was measured.
    `looks` says how often items were drawn, `items` and `windows` how many there were in all, of the tasks that are
    judged together; `truncated` how many
    requests, those of fresh items among them, were too long and lost their beginning. `accuracy` and
    `perplexity` are the candidate's; `recovery` and `perplexity_ratio` compare it with the baseline. All
    intervals have the two-sided confidence of their look (see `trimtab.judge.verdict`). `mcnemar_p`, for the
    hypothesis that nothing changed, is shown and not decided on. `beside` is the unchanged model on the same items and
    windows. `damage` says what was lost by task and by place in the text. `power`, the baseline's alone, says what the
    items of the run can show. `gain` is the relative improvement at the goal.
    """

    outcome: Literal["accepted", "rejected", "indeterminate", "baseline"]
    failure_class: FailureClass | None = None
    reason: str
    stage: str = ""
    looks: int = 0
    items: int = 0
    windows: int = 0
    truncated: int = 0
    accuracy: Interval | None = None
    recovery: Interval | None = None
    perplexity: float | None = None
    perplexity_ratio: Interval | None = None
    mcnemar_p: float | None = None
    beside: Beside | None = None
    damage: Damage | None = None
    power: Power | None = None
    gain: float | None = None
    confirmed: bool = False
    confirmation: Confirmation | None = None
    measurements: Measurements = Measurements()
