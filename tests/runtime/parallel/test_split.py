"""Which part of a layer each rank holds, on tensors that name their own places."""

import pytest
import torch

from trimtab.runtime.parallel import split

#: Four rows, eight columns; entry = 10 * row + column.
MATRIX = torch.arange(4)[:, None] * 10 + torch.arange(8)


@pytest.mark.parametrize(
    ("units", "ranks", "rows"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (2, 2, [[0, 1], [2, 3]]),
        (2, 1, [[0, 1, 2, 3]]),
        # more ranks than heads: neighbours share one
        (2, 4, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (1, 2, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_rows(units, ranks, rows):
    found = [(split.rows(MATRIX, units, rank, ranks)[:, 0] // 10).tolist() for rank in range(ranks)]
    assert found == rows


def test_columns_and_padded_rows():
    assert [split.columns(MATRIX, r, 2)[1].tolist() for r in range(2)] == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert [split.padded_rows(MATRIX, r, 3)[:, 1].tolist() for r in range(3)] == [[1, 11], [21, 31], [0, 0]]


@pytest.mark.parametrize(
    ("part", "shape", "column", "row"),
    [
        ("weight", (4, 8), (2, 8), (4, 4)),
        ("weight_scale", (1,), (1,), (1,)),  # FP8: one
        ("weight_scale", (4,), (2,), (4,)),  # INT8: one a row
        ("weight_scale", (4, 2), (2, 2), (4, 1)),  # INT4: one a group
        ("input_scale", (1,), (1,), (1,)),
        ("pre_quant_scale", (8,), (8,), (4,)),  # one an input
        ("bias", (4,), (2,), (4,)),
    ],
)
def test_what_is_split_and_what_is_whole(part, shape, column, row):
    tensor = torch.zeros(shape)
    assert tuple(split.column_parallel(part, tensor, 4, 1, 2).shape) == column
    assert tuple(split.row_parallel(part, tensor, 1, 2).shape) == row


def test_what_does_not_come_out_even_is_refused():
    with pytest.raises(ValueError, match="4 rows in 4 runs cannot be shared out among 3 ranks"):
        split.rows(MATRIX, 4, 0, 3)
    with pytest.raises(ValueError, match="4 rows in 3 runs"):
        split.rows(MATRIX, 3, 0, 3)
    with pytest.raises(ValueError, match="8 columns cannot be shared out among 3 ranks"):
        split.columns(MATRIX, 0, 3)
