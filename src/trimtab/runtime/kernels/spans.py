"""The work of a step's attention, cut for `paged_attention`: a few tokens of one sequence for each of its programs.

Axes in names: B spans, S sequences, W blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spans:
    """What each program of the kernel computes: a few tokens of one sequence.

    Args:
        spans_B4: int32, of each span: its first token in the pass, its tokens (0 for none), the position of the first
            in its sequence, and its sequence's row of the tables.
            Where every token has one, they stand in the tokens' order.
        tables_SW: int32, the blocks of each sequence.
        tokens: of a span at most, a power of 2.
    """

    spans_B4: torch.Tensor
    tables_SW: torch.Tensor
    tokens: int
