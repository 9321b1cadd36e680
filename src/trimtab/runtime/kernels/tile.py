"""How a product of few rows is cut for `runtime.kernels.matmul`: what is tried, and what usually does well."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One way to cut it.

    Args:
        outputs, inputs: rows of the matrix, and what is stored of them, that a program has at a time; powers of 2.
        warps: of a program.
        stages: loads that are on their way at once.
        parts: programs that share the columns.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int
    parts: int

    def divides(self, rows: int, stored: int, group_size: int = 0) -> bool:
        """Whether it divides a matrix of so many rows, so much stored of each, and its groups."""
        return not (rows % self.outputs or stored % self.inputs or group_size % self.inputs)


#: For matrices in the type of their input, FP8 or INT8.
BYTES = (
    Tile(64, 128, 4, 5, 1), Tile(64, 128, 4, 5, 2), Tile(64, 128, 4, 5, 4), Tile(64, 128, 4, 3, 1),
    Tile(64, 256, 4, 3, 4), Tile(64, 256, 4, 5, 2), Tile(128, 256, 4, 3, 1),
)  # fmt: skip
#: The same for small models, whose layers none of those divides.
SMALL_BYTES = (Tile(64, 64, 4, 4, 1), Tile(64, 64, 4, 4, 4), Tile(32, 64, 2, 4, 1))
#: For words of INT8 and INT4: few warps for 16 rows of input, eight for 64.
WORDS = (
    Tile(64, 64, 2, 3, 1), Tile(64, 64, 2, 4, 1), Tile(64, 64, 2, 3, 4), Tile(64, 64, 2, 3, 8), Tile(32, 128, 2, 3, 4),
    Tile(128, 64, 8, 2, 1), Tile(128, 64, 8, 3, 4), Tile(128, 64, 8, 4, 4), Tile(128, 64, 4, 4, 1),
)  # fmt: skip
#: Rows of input up to which a tile is one for few.
FEW = 16


def usual(rows: int, stored: int, group_size: int, few: bool) -> Tile:
    """Returns a tile for words that needs no measuring, small where the matrix is small or its sizes odd.

    Args:
        rows, stored: of the matrix, multiples of 16.
        group_size: a multiple of 16, or 0.
        few: whether the input has at most FEW rows.
    """
    most, programs = (64, 264) if few else (128, 128)  # that fill a large GPU twice, or once
    outputs = next(size for size in (128, 64, 32, 16) if size <= most and not rows % size)
    inputs = next(size for size in (64, 32, 16) if not stored % size and not group_size % size)
    parts = 1
    while parts < 8 and rows // outputs * parts < programs and stored // inputs >= 8 * parts:
        parts *= 2
    return Tile(outputs, inputs, max(1, outputs // (32 if few else 16)), 3, parts)
