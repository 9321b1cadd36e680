"""Weights of eight and four bits in words of 16 bits, as `runtime.kernels.matmul` reads them.

A word holds a number of each half of a row (INT8), or of each quarter (INT4), the first in its lowest bits: so one load
brings numbers that meet the same place of two or four parts of the input, without moving bits between threads. INT8
stands in two's complement, INT4 eight higher than it is, and E2M1 as its code, eight higher than `codes_e2m1`.
"""

from __future__ import annotations

import torch

WORD = 16


def pack(numbers_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns int16 [O, I * bits / 16] of int8 [O, I], whose columns are a multiple of 16 / bits."""
    above = 8 if bits == 4 else 0
    parts = numbers_OI.chunk(WORD // bits, dim=1)
    words = torch.zeros_like(parts[0], dtype=torch.int32)
    for place, part in enumerate(parts):
        words |= ((part.int() + above) & (1 << bits) - 1) << bits * place
    return words.to(torch.int16)  # which keeps the lowest bits


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns int8 [O, I]."""
    parts = [words >> bits * place & (1 << bits) - 1 for place in range(WORD // bits)]
    numbers_OI = torch.cat(parts, dim=1)
    return (numbers_OI - 8 if bits == 4 else numbers_OI).to(torch.int8)
