"""Decoding as it was measured, by target, back end, format and batch: what a plan for a workload goes by.

The figures are those of benchmarks/results/h200.md, with the command that reprints them: random weights in the shape of
Llama 3 8B on one device, prompts of 128 tokens, answers of 256, one run of each. There is no other table yet: of no
other device, model of another size, mixture of experts, KV cache in 8 bits, or engine on several devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Of one target and back end: `speeds` are tokens a second of all sequences, {format: {batch: tokens}}."""

    speeds: dict[str, dict[int, int]]

    def times(self, form: str, batch: int) -> float | None:
        """Returns how many times the unchanged model's tokens a format decodes; None outside of what was measured.

        Between two batches the ratio is interpolated by the logarithm of the batch.
        """
        ours, theirs = self.speeds.get(form), self.speeds["bf16"]
        if ours is None or not min(ours) <= batch <= max(ours):
            return None
        below = max(n for n in ours if n <= batch)
        above = min(n for n in ours if n >= batch)
        low, high = ours[below] / theirs[below], ours[above] / theirs[above]
        return low if below == above else low + (high - low) * math.log(batch / below) / math.log(above / below)


#: By (target, back end).
TABLES = {
    ("h200", "torch"): Table(
        {
            "bf16": {1: 240, 8: 1679, 64: 11671},
            "fp8": {1: 351, 8: 2496, 64: 16418},
            "int8_wo": {1: 338, 8: 2555, 64: 14474},
            "int8_sq": {1: 329, 8: 2510, 64: 15958},
            "int4_awq": {1: 387, 8: 2946, 64: 12795},
        },
    ),
    ("h200", "vllm"): Table(
        {
            "bf16": {1: 205, 8: 1572, 64: 10499},
            "fp8": {1: 307, 8: 2383, 64: 14659},
            "int4_awq": {1: 265, 8: 2080, 64: 10708},
        }
    ),
}
#: The smallest group of weights that share a scale: the tables had 64, and larger ones are read sooner.
LEAST_GROUP = 64
#: Parameters of the models that the tables may speak for: half of an 8B to twice that. A model of 135 million, whose
#: layers take less than their launches, decodes slower in fewer bits (benchmarks/results/h100.md).
SIZES = (4e9, 16e9)
