"""What a linear layer takes in each format, as a share of what it takes in 16 bits: by reading, or by multiplying.

With few rows a product takes the time of reading its weights, with many that of its multiplications; between them the
longer of the two. Where they cross, and how much faster few bits are multiplied, are figures of NVIDIA's datasheets: an
H200 reads 4.8 TB/s and multiplies 989 TFLOPS in BF16, so it reads and multiplies a weight in as much time with 206
rows; FP8 is multiplied at twice, FP4 at four times that rate (B200, dense); weights alone in 16 bits' own.
"""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.catalog.formats import FORMATS

#: Rows with which reading a 16-bit weight takes as long as multiplying it.
ROWS = 206
#: How much faster than in BF16 products are, by the numbers that both sides have; 1 for all others.
RATES = {"e4m3": 2.0, "int8": 2.0, "e2m1": 4.0}
#: Weights that share a scale, where a recipe says how many.
GROUP = 128


def relative(formats: Iterable[str], step_tokens: int) -> dict[str, float]:
    """Returns the time of each format with so many tokens a step, the rows of its products, as a share of BF16's."""
    rows = step_tokens / ROWS
    found = {}
    for name in formats:
        storage = FORMATS[name].storage
        bits = storage.bits_with_scales(GROUP) if storage else 16
        inputs = storage.inputs if storage else None
        rate = RATES.get(inputs.numbers, 1.0) if inputs and inputs.numbers == storage.numbers else 1.0
        found[name] = max(bits / 16, rows / rate) / max(1.0, rows)
    return found
