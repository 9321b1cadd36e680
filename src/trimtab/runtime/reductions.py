"""What calibration reduces activations to, in one reading of them.

PyTorch's own reductions read a matrix several times, and take a launch for each: on an H100 a pass over an 8B model
that measured so took 1.64 times the bare one. Where Triton is, which comes with PyTorch's CUDA builds, one kernel does
it.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

#: Of a matrix, what one program holds at a time, and the rows that it walks through.
_COLUMNS, _TILE, _ROWS = 128, 32, 256
#: The product of two norms below which a cosine is 0, as in torch.cosine_similarity.
_EPSILON = 1e-8


def column_extremes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest magnitude and the sum of squares of each column, float32 [columns] both.

    Args:
        matrix: [rows, columns], of any floating type.
    """
    if _has_kernels(matrix):
        return launch_column_extremes(matrix.contiguous())
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=0).float()
    return largest, torch.linalg.vector_norm(matrix, 2, dim=0, dtype=torch.float32).square()


def row_cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the cosine between each row of one matrix and that of the other, float32 [rows].

    Args:
        left, right: [rows, columns], of any floating type.
    """
    if _has_kernels(left):
        return launch_row_cosines(left.contiguous(), right.contiguous())
    return torch.cosine_similarity(left.float(), right.float(), dim=-1, eps=_EPSILON)


def _has_kernels(tensor: torch.Tensor) -> bool:
    return triton is not None and tensor.device.type == "cuda"


def launch_column_extremes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Does `column_extremes` by the kernel: results of some rows each, then their maximum and sum."""
    rows, columns = matrix.shape
    parts = -(-rows // _ROWS)
    partial = torch.empty(2, parts, columns, device=matrix.device)
    grid = (-(-columns // _COLUMNS), parts)
    _column_extremes[grid](matrix, partial, rows, columns, parts, COLUMNS=_COLUMNS, TILE=_TILE, ROWS=_ROWS)
    return partial[0].amax(0), partial[1].sum(0)


def launch_row_cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Does `row_cosines` by the kernel, a program a row."""
    rows, columns = left.shape
    found = torch.empty(rows, device=left.device)
    _row_cosines[(rows,)](left, right, found, COLUMNS=columns, STEP=1024, EPSILON=_EPSILON)
    return found


if triton is not None:

    @triton.jit
    def _column_extremes(
        matrix, partial, rows, columns, parts, COLUMNS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        part = tl.program_id(1)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        largest = tl.zeros((COLUMNS,), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, ROWS, TILE):
            row = part * ROWS + start + tl.arange(0, TILE)
            place = row[:, None].to(tl.int64) * columns + column[None, :]
            tile = tl.load(matrix + place, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(tile), 0))
            squares += tl.sum(tile * tile, 0)
        tl.store(partial + part * columns + column, largest, mask=inside)
        tl.store(partial + (parts + part) * columns + column, squares, mask=inside)

    @triton.jit
    def _row_cosines(left, right, found, COLUMNS: tl.constexpr, STEP: tl.constexpr, EPSILON: tl.constexpr):
        row = tl.program_id(0)
        dot = tl.zeros((STEP,), tl.float32)
        first = tl.zeros((STEP,), tl.float32)
        second = tl.zeros((STEP,), tl.float32)
        for start in range(0, COLUMNS, STEP):
            column = start + tl.arange(0, STEP)
            place = row.to(tl.int64) * COLUMNS + column
            a = tl.load(left + place, mask=column < COLUMNS, other=0.0).to(tl.float32)
            b = tl.load(right + place, mask=column < COLUMNS, other=0.0).to(tl.float32)
            dot += a * b
            first += a * a
            second += b * b
        size = tl.sqrt(tl.sum(first, 0) * tl.sum(second, 0))
        tl.store(found + row, tl.sum(dot, 0) / tl.maximum(size, EPSILON))
