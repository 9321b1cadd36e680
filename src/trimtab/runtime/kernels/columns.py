"""Columns rounded one after the other, in Triton; imported only where that is.

A program has all columns of the block for a few rows of the matrix, so nothing is exchanged between programs.

Axes in names: I columns of the block, R rows of the matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Rows of the matrix that a program, of one warp, has at a time.
ROWS = 32
#: What is added to a float32 so that it has no bits left for a fraction: 1.5 * 2 ** 23.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _rounded(value, NUMBERS: tl.constexpr):
    """Rounds float32 to numbers of a type, ties to even; beyond the largest to the largest."""
    if NUMBERS == "int4":
        value = tl.minimum(tl.maximum((value + WHOLE) - WHOLE, -8.0), 7.0)
    elif NUMBERS == "int8":
        value = tl.minimum(tl.maximum((value + WHOLE) - WHOLE, -127.0), 127.0)
    else:
        # Between two powers of two the numbers of e2m1 are a half of the lower one apart, those of e4m3 an eighth;
        # below the smallest power that has an exponent of its own, as far as above it.
        largest: tl.constexpr = 6.0 if NUMBERS == "e2m1" else 448.0
        smallest: tl.constexpr = 1.0 if NUMBERS == "e2m1" else 0.015625
        parts: tl.constexpr = 2.0 if NUMBERS == "e2m1" else 8.0
        size = tl.minimum(tl.abs(value), largest)
        power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, smallest) / parts
        size = ((size / step + WHOLE) - WHOLE) * step  # powers of two divide exactly
        value = tl.where(value < 0, -size, size)
    return value


@triton.jit
def _in_turn(
    open, scale, passed_on, before, rounded, moved, rows,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FROM_OPEN: tl.constexpr, NUMBERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = column[:, None] * rows + row[None, :]
    value = tl.load(open + at, mask=(column[:, None] < COLUMNS) & inside[None, :], other=0.0)
    for i in range(COLUMNS):
        own = tl.sum(tl.where(column[:, None] == i, value, 0.0), axis=0)
        unit = tl.load(scale + i * rows + row, mask=inside, other=1.0)
        nearest = _rounded(tl.math.div_rn(own, unit), NUMBERS) * unit
        start = own
        if not FROM_OPEN:
            start = tl.load(before + i * rows + row, mask=inside, other=0.0)
        step = nearest - start
        tl.store(rounded + i * rows + row, nearest, mask=inside)
        tl.store(moved + i * rows + row, step, mask=inside)
        told = tl.load(passed_on + i * COLUMNS + column, mask=(column > i) & (column < COLUMNS), other=0.0)
        value += told[:, None] * step[None, :]


def in_turn(
    open_IR: torch.Tensor,
    scale_IR: torch.Tensor,
    passed_on_II: torch.Tensor,
    numbers: str,
    before_IR: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `in_turn` of `components.quantization.methods.columns`, which uses it.

    Args:
        numbers: a type of `catalog.numbers.NUMBERS`: int4, int8, e4m3 or e2m1.
    """
    columns, rows = open_IR.shape
    rounded_IR, moved_IR = (torch.empty_like(open_IR, memory_format=torch.contiguous_format) for _ in range(2))
    given = [tensor.contiguous() for tensor in (open_IR, scale_IR, passed_on_II)]
    given.append(given[0] if before_IR is None else before_IR.contiguous())
    width = triton.next_power_of_2(columns)
    _in_turn[(triton.cdiv(rows, ROWS),)](
        *given, rounded_IR, moved_IR, rows, COLUMNS=columns, WIDTH=width, FROM_OPEN=before_IR is None, NUMBERS=numbers,
        ROWS=ROWS, num_warps=1,
    )  # fmt: skip
    return rounded_IR, moved_IR
