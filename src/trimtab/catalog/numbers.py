"""The types of numbers that are stored or multiplied in few bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """One type of number.

    `bits` of one; `largest`, what the largest number of a block becomes when its scale is the smallest that clips
    nothing; `mantissa`, the bits after the leading one, which put neighbours 2 ** -mantissa apart in proportion to
    their size, or None for whole numbers, whose neighbours are 1 apart; `packed`, along which axis of a weight two
    numbers share a byte, "" where each has its own.
    """

    bits: int
    largest: float
    mantissa: int | None = None
    packed: str = ""


#: By name. E4M3 and E2M1 are those of the OCP Microscaling specification 1.0. ModelOpt packs INT4 along the outputs
#: and E2M1 along the inputs (modelopt/torch/export/quant_utils.py, 0.47).
NUMBERS = {
    "int8": Number(8, largest=127),
    "int4": Number(4, largest=7, packed="out"),
    "e4m3": Number(8, largest=448, mantissa=3),
    "e2m1": Number(4, largest=6, mantissa=1, packed="in"),
}
