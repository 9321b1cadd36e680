"""Decoding steps as CUDA graphs, recorded when first needed: Python launches a step's kernels slower than they run.

A graph has fixed shapes. So the number of sequences and the width of their tables are rounded up, padding writes into
the block that is nobody's, and every pair of sizes has a recording of its own; all share their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trimtab.runtime.paged import PagedKVCache, Pass

#: Columns of a row before the blocks of its table.
COLUMNS = 4
Forward = Callable[[torch.Tensor, torch.Tensor, Pass], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One sequence's token in a decoding step: where it stands, and the blocks that it looks at."""

    token: int
    position: int
    slot: int
    blocks: list[int]


def to_tensor(rows: list[Row], sequences: int, width: int, padding_slot: int, block_size: int) -> torch.Tensor:
    """Returns rows as int64 [sequences, COLUMNS + width]: token, position, slot, tokens to look at, blocks.

    What is not filled looks at one token of the block that is nobody's, and writes there.
    """
    nobody = padding_slot // block_size
    lines = [
        [row.token, row.position, row.slot, row.position + 1, *row.blocks, *[nobody] * (width - len(row.blocks))]
        for row in rows
    ]
    lines += [[0, 0, padding_slot, 1, *[nobody] * width]] * (sequences - len(rows))
    return torch.tensor(lines, dtype=torch.int64)


def rounded_up(number: int) -> int:
    """Returns the least of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is not less."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


class Replays:
    """Runs decoding steps: `path` says how, and on a GPU why no faster.

    Args:
        forward: (tokens int64 [1, T], positions [1, T], pass) -> logits [T, vocabulary].
    """

    def __init__(self, forward: Forward, cache: PagedKVCache, device: torch.device):
        self._forward, self._cache, self._device = forward, cache, device
        self._graphs: dict[tuple[int, int], tuple[torch.Tensor, torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._records = device.type == "cuda"
        self.path = "CUDA graph" if self._records else "loop"

    def __call__(self, rows: list[Row]) -> torch.Tensor:
        """Returns the logits of each row, [n, vocabulary]; on a GPU they are overwritten by the next call."""
        count, width = len(rows), max(len(row.blocks) for row in rows)
        if self._records:
            sequences, width = 1 << (count - 1).bit_length(), rounded_up(width)
            lines = self._to_tensor(rows, sequences, width)
            if (sequences, width) not in self._graphs:
                self._record(lines)
        if not self._records:  # never, or no longer
            return self._step(self._to_tensor(rows, count, width).to(self._device))
        held, graph, logits = self._graphs[sequences, width]
        held.copy_(lines)
        graph.replay()
        return logits[:count]

    def _to_tensor(self, rows: list[Row], sequences: int, width: int) -> torch.Tensor:
        return to_tensor(rows, sequences, width, self._cache.padding_slot, self._cache.block_size)

    def _step(self, lines: torch.Tensor) -> torch.Tensor:
        tokens, positions, slots, lengths = lines[:, :COLUMNS].t().contiguous()
        where = Pass(self._cache, slots, lines[:, COLUMNS:].contiguous(), lengths, [])
        return self._forward(tokens[None], positions[None], where)

    def _record(self, lines: torch.Tensor) -> None:
        """Records a step of this size and tries the recording against the step itself; a failure ends all of them."""
        try:
            held = lines.to(self._device)
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # libraries choose and load their kernels
                self._step(held)
                expected = self._step(held).float()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[1].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                logits = self._step(held)
            graph.replay()
            if (logits.float() - expected).abs().max() > 0.02 * expected.abs().max():
                raise RuntimeError("a replayed step has other logits than the step itself")
            self._graphs[tuple((lines.shape[0], lines.shape[1] - COLUMNS))] = (held, graph, logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that a recording does not allow
            first = str(error).strip().partition("\n")[0]
            self.path = f"loop, as no CUDA graph could be made: {type(error).__name__}: {first}"
            self._records = False
