"""Steps as rows of numbers: every token has its place, and a step one of a few shapes."""

from __future__ import annotations

import pytest
import torch

from trimtab.runtime.service import step_inputs
from trimtab.runtime.service.step_inputs import Item, Shape


class Cache:
    """Of a cache, what a pass is told of."""


@pytest.mark.parametrize("span", [1, 16])
def test_every_token_is_where_its_sequence_says(span: int) -> None:
    alone = [Item([7], 0, [4]), Item([8], 16, [2, 5]), Item([9], 31, [3, 1])]
    items = alone if span == 1 else [*alone, Item(list(range(40, 73)), 10, [6, 0, 8])]
    shape = Shape.of(items, padding=2, most=4)
    assert shape.span == span
    row = step_inputs.pack(items, shape, block_size=16, padding_slot=160)
    tokens, positions, where, last = step_inputs.unpack(row, shape, Cache())
    assert (tokens.shape, positions.shape, len(where.slots_T)) == ((1, shape.tokens), (1, shape.tokens), shape.tokens)
    first = 0
    found = [tuple(line) for line in where.spans.spans_B4.tolist()]
    expected = []
    for number, item in enumerate(items):
        for offset, token in enumerate(item.tokens):
            position = item.position + offset
            assert tokens[0, first + offset] == token and positions[0, first + offset] == position
            assert where.slots_T[first + offset] == item.blocks[position // 16] * 16 + position % 16
        for done in range(0, len(item.tokens), span):
            expected.append((first + done, min(span, len(item.tokens) - done), item.position + done, number))
        assert where.spans.tables_SW[number, : len(item.blocks)].tolist() == item.blocks
        first += len(item.tokens)
        if span > 1:
            assert last[number] == first - 1
    assert found == expected + [(0, 0, 0, 0)] * (shape.spans - len(expected))
    assert (where.slots_T[first:] == 160).all() and shape.tokens >= first + 2
    assert where.slots_T.dtype == tokens.dtype == torch.int64 and (last is None) == (span == 1)


@pytest.mark.parametrize(
    ("counts", "padding", "tokens"),
    [([1], 0, 1), ([1] * 5, 0, 6), ([1] * 5, 2, 8), ([1, 3], 0, 32), ([40, 60, 1], 0, 128), ([1000], 1, 1024),
     ([1030], 0, 1280), ([4097], 0, 4097)],
)  # fmt: skip
def test_shapes(counts: list[int], padding: int, tokens: int) -> None:
    items = [Item([0] * count, 0, [0] * -(-count // 16)) for count in counts]
    shape = Shape.of(items, padding, most=8)
    assert shape.tokens == tokens and shape.is_recorded == (tokens <= 4096)
    row = step_inputs.pack(items, shape, 16, 0)  # everything has room
    assert len(row) == shape.size


def test_usual_shapes_are_those_that_steps_have() -> None:
    usual = set(step_inputs.shapes(most=6, budget=200))
    for counts in ([1], [1] * 6, [2], [100, 1, 1], [200], [33] * 6):
        assert Shape.of([Item([0] * count, 0, [0]) for count in counts], 0, 6) in usual
    assert len(usual) < 20
