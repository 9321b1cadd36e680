"""Columns of a matrix that are rounded one after the other, each telling those behind it by how much it has moved.

What methods of second order go through for every column of every layer: on a GPU the launching of so many small kernels
would be most of their time, so there one kernel goes through a block of them.

Axes in names: I columns of the block, R rows of the matrix; a column stands in memory as a row.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from trimtab.runtime.rounding.scales import E2M1, FP8, INT4, INT8, Numbers


def in_turn(
    open_IR: torch.Tensor,
    scale_IR: torch.Tensor,
    passed_on_II: torch.Tensor,
    numbers: Numbers,
    before_IR: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rounded columns, and by what each has moved, float32 [I, R] both.

    Args:
        open_IR: what is rounded, float32; the first column as it is, and to each other one is added, for every column
            before it, by what that has moved times their entry in `passed_on_II`.
        scale_IR: each number's scale, float32.
        passed_on_II: row: who moves; column: who is told. Only what stands above the diagonal is read.
        before_IR: from what a column moves; from what is rounded where it is None.
    """
    kernel = _kernel() if open_IR.is_cuda else None
    if kernel is not None:
        return kernel.in_turn(open_IR, scale_IR, passed_on_II, numbers.type, before_IR)
    return one_by_one(open_IR, scale_IR, passed_on_II, numbers, before_IR)


def one_by_one(
    open_IR: torch.Tensor,
    scale_IR: torch.Tensor,
    passed_on_II: torch.Tensor,
    numbers: Numbers,
    before_IR: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `in_turn` does, by PyTorch's functions, on any device."""
    open_IR, rounded_IR, moved_IR = open_IR.clone(), torch.empty_like(open_IR), torch.empty_like(open_IR)
    before_IR = open_IR if before_IR is None else before_IR
    for i in range(len(open_IR)):
        torch.mul(numbers.round(open_IR[i] / scale_IR[i]), scale_IR[i], out=rounded_IR[i])
        torch.sub(rounded_IR[i], before_IR[i], out=moved_IR[i])
        open_IR[i + 1 :].addr_(passed_on_II[i, i + 1 :], moved_IR[i])
    return rounded_IR, moved_IR


@functools.cache
def _kernel() -> ModuleType | None:
    """The kernel's module, where Triton is, compiles for this GPU, and finds what `one_by_one` does."""
    try:
        from trimtab.runtime.kernels import columns

        return columns if all(_agrees(columns, numbers) for numbers in (INT4, INT8, FP8, E2M1)) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a missing library or a compiler says about a card
        return None


def _agrees(kernel: ModuleType, numbers: Numbers) -> bool:
    draw = torch.Generator().manual_seed(0)
    open_IR, told_II = torch.randn(64, 96, generator=draw).cuda(), 0.1 * torch.randn(64, 64, generator=draw).cuda()
    scale_IR = torch.full_like(open_IR, 2 / numbers.largest)
    found_IR, _ = kernel.in_turn(open_IR, scale_IR, told_II, numbers.type)
    expected_IR, _ = one_by_one(open_IR, scale_IR, told_II, numbers)
    # What is halfway between two numbers goes to either, by the last place of a sum.
    return bool(((found_IR - expected_IR).abs() > 1e-4).float().mean() < 0.01)
