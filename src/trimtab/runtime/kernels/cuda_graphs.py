"""Steps as CUDA graphs, recorded when first needed: Python launches a step's kernels slower than they run.

A graph has fixed shapes. So the numbers of sequences and of their blocks are rounded up, padding writes into the block
that is nobody's, and every shape has a recording of its own; all share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Columns of a row before the blocks of its table.
COLUMNS = 4
#: Bytes that works together read if none is to find its own in the cache: more than twice the L2 cache of an H200.
COLD_BYTES = 160 << 20
#: Replays of which the fastest tells the time of a work.
_ROUNDS = 5


@dataclass(frozen=True)
class StepToken:
    """One sequence's token in a decoding step: where it stands, and the blocks that it looks at."""

    token: int
    position: int
    slot: int
    blocks: list[int]


def to_tensor(rows: list[StepToken], sequences: int, width: int, padding_slot: int, block_size: int) -> torch.Tensor:
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


class Recordings:
    """Runs steps, recorded on a GPU: `path` says how, and on a GPU why no faster."""

    def __init__(self, device: torch.device, wanted: bool = True):
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.Tensor, torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.records = wanted and device.type == "cuda"
        self.path = "CUDA graph" if self.records else "loop"

    def __call__(self, shape: Hashable, numbers: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor]):
        """Returns `step(numbers)`, by a recording that depends on `shape` alone.

        Args:
            numbers: on the CPU; of the same size in every call with this shape.

        Returns:
            logits, which the next call overwrites.
        """
        if self.records and shape not in self._graphs:
            self._record(shape, numbers, step)
        if not self.records:  # never, or no longer
            return step(numbers.to(self._device))
        held, graph, logits = self._graphs[shape]
        held.copy_(numbers)
        graph.replay()
        return logits

    def _record(self, shape: Hashable, numbers: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Records a step of this shape and tries the recording against the step itself; a failure ends all of them."""
        try:
            held = numbers.to(self._device)
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # libraries choose and load their kernels
                step(held)
                expected = step(held).float()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[1].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                logits = step(held)
            graph.replay()
            if not (logits.float() - expected).abs().max() <= 0.02 * expected.abs().max():  # NaN is not
                raise RuntimeError("a replayed step has other logits than the step itself")
            self._graphs[shape] = (held, graph, logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that a recording does not allow
            first = str(error).strip().partition("\n")[0]
            self.path = f"loop, as no CUDA graph could be made: {type(error).__name__}: {first}"
            self.records = False


def seconds(works: Sequence[Callable[[], Any]]) -> float:
    """Returns the seconds of one of several alike, in the fastest replay of a CUDA graph of all."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries choose and load their kernels
        works[0]()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    taken = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return min(taken) / len(works)
