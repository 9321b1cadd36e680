"""A step for the kernel of `runtime.kernels.paged_attention`, as one row of numbers in one of a few shapes.

One row is one copy to the GPU, and a fixed shape can be recorded: so the numbers of tokens and sequences are rounded
up, and what is not filled is tokens without a span, which write where nobody reads and look at nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trimtab.runtime.kernels.cuda_graphs import rounded_up
from trimtab.runtime.kernels.spans import Spans
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.kv_cache.paged_attention import Pass

#: Tokens of a prompt that one program of the kernel reads.
SPAN = 16
#: Columns of a table at least, so that most steps have the same.
WIDTH = 64
#: Tokens of a step at most that is worth a recording: longer ones keep a GPU busier than Python needs to launch them.
RECORDED = 4096


@dataclass(frozen=True)
class Item:
    """The next tokens of a sequence, the position of the first of them, and the sequence's blocks up to the last."""

    tokens: list[int]
    position: int
    blocks: list[int]


@dataclass(frozen=True)
class Shape:
    """Of a step: its tokens, spans, sequences, columns of its tables, and tokens of a span at most."""

    tokens: int
    spans: int
    sequences: int
    width: int
    span: int

    @classmethod
    def of(cls, items: list[Item], padding: int, most: int) -> Shape:
        """Returns the shape in which items and so many tokens of padding are computed; `most` sequences in any step."""
        width = max(WIDTH, _power_of_2(max(len(item.blocks) for item in items)))
        tokens = sum(len(item.tokens) for item in items) + padding
        if all(len(item.tokens) == 1 for item in items):
            return cls.decoding(rounded_up(tokens), width)
        return cls.mixed(_eighths(tokens) if tokens <= RECORDED else tokens, most, width)

    @classmethod
    def decoding(cls, tokens: int, width: int = WIDTH) -> Shape:
        """Of a step of single tokens."""
        return cls(tokens, tokens, tokens, width, 1)

    @classmethod
    def mixed(cls, tokens: int, most: int, width: int = WIDTH) -> Shape:
        """Of a step that reads prompts: a sequence has a span for each SPAN of its tokens, and one for the rest."""
        return cls(tokens, tokens // SPAN + min(most, tokens), most, width, SPAN)

    @property
    def is_recorded(self) -> bool:
        """Whether a recording of it is worth its memory."""
        return self.tokens <= RECORDED

    def split(self, numbers: torch.Tensor | np.ndarray) -> list:
        """Returns tokens, positions, slots, spans, tables and last tokens: views of one row of numbers."""
        ends = np.cumsum([0, *[self.tokens] * 3, 4 * self.spans, self.sequences * self.width, self.sequences])
        parts = [numbers[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]
        parts[3], parts[4] = parts[3].reshape(self.spans, 4), parts[4].reshape(self.sequences, self.width)
        return parts

    @property
    def size(self) -> int:
        """Numbers of the row."""
        return 3 * self.tokens + 4 * self.spans + self.sequences * (self.width + 1)


def pack(items: list[Item], shape: Shape, block_size: int, padding_slot: int) -> torch.Tensor:
    """Returns the row, int32 [shape.size]; each item's last token is one of which the logits are computed."""
    row = np.zeros(shape.size, np.int32)
    tokens, positions, slots, spans, tables, last = shape.split(row)
    slots[:] = padding_slot
    counts = np.array([len(item.tokens) for item in items])
    first = np.cumsum(counts) - counts
    for number, item in enumerate(items):
        tables[number, : len(item.blocks)] = item.blocks
    used = int(counts.sum())
    owner = np.repeat(np.arange(len(items)), counts)
    begins = np.array([item.position for item in items])
    tokens[:used] = [token for item in items for token in item.tokens]
    positions[:used] = begins[owner] + np.arange(used) - first[owner]
    at = positions[:used]
    slots[:used] = tables[owner, at // block_size] * block_size + at % block_size
    of_item = -(-counts // shape.span)
    span_owner = np.repeat(np.arange(len(items)), of_item)
    done = (np.arange(len(span_owner)) - (np.cumsum(of_item) - of_item)[span_owner]) * shape.span
    spans[: len(span_owner)] = np.stack(
        [first[span_owner] + done, np.minimum(shape.span, counts[span_owner] - done), begins[span_owner] + done,
         span_owner], axis=1,
    )  # fmt: skip
    last[: len(items)] = first + counts - 1
    return torch.from_numpy(row)


def unpack(
    row: torch.Tensor, shape: Shape, cache: PagedKVCache
) -> tuple[torch.Tensor, torch.Tensor, Pass, torch.Tensor | None]:
    """Returns tokens and positions, int64 [1, T], the pass, and which tokens' logits are asked for; None is all."""
    tokens, positions, slots, spans, tables, last = shape.split(row)
    where = Pass(cache, slots.long(), spans=Spans(spans, tables, shape.span))
    return tokens.long()[None], positions.long()[None], where, last.long() if shape.span > 1 else None


def shapes(most: int, budget: int) -> list[Shape]:
    """Returns the usual shapes of an engine that computes `most` sequences and `budget` tokens in a step."""
    alone = sorted({rounded_up(tokens) for tokens in range(1, most + 1)})
    mixed = sorted({_eighths(tokens) for tokens in range(2, min(RECORDED, budget) + 1)})
    return [Shape.decoding(tokens) for tokens in alone] + [Shape.mixed(tokens, most) for tokens in mixed]


def _eighths(tokens: int) -> int:
    """Rounds up by less than a quarter: a prompt's tokens cost a GPU as much as they are many, unlike single ones."""
    step = max(2 * SPAN, _power_of_2(tokens) // 8)
    return -(-tokens // step) * step


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
