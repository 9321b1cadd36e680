"""Packs scoring requests into rows and rows into batches.

Requests with the same context share a row: the context once, then a branch for each continuation. A mask
keeps branches from seeing each other, and every branch counts its positions on from the context, so a row
computes what its requests would compute alone. Source of the idea: tree attention, Miao et al. 2023, SpecInfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

ScoringRequest = tuple[list[int], list[int]]

#: More branches would make rows long, and attention quadratic in it.
MAX_BRANCHES = 16


@dataclass
class PackedRow:
    """A context and the continuations scored on it, by the index of their request."""

    context: list[int]
    branches: list[tuple[int, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens of the row: a continuation's last token is predicted, never read."""
        return len(self.context) + sum(len(continuation) - 1 for _, continuation in self.branches)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right; B rows, L tokens, n scored tokens.

    `rows`, `columns` and `targets` (each int64 [n]) say which hidden state predicts which token; `owners` of
    which request. `mask` (bool [B, 1, L, L], True where attention may look) is None where causal is enough.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def rows(requests: Iterable[ScoringRequest], share: bool, max_tokens: int) -> list[PackedRow]:
    """Groups requests into rows of at most `max_tokens` (a single longer request keeps its own row)."""
    finished, open_rows = [], {}
    for index, (context, continuation) in enumerate(requests):
        key = tuple(context) if share else index
        row = open_rows.get(key)
        full = row and (len(row.branches) == MAX_BRANCHES or len(row) + len(continuation) - 1 > max_tokens)
        if row is None or full:
            row = open_rows[key] = PackedRow(context)
            finished.append(row)
        row.branches.append((index, continuation))
    return finished


def batches(all_rows: list[PackedRow], max_tokens: int) -> Iterator[list[PackedRow]]:
    """Yields rows sorted by length, longest first, in batches of at most `max_tokens` with their padding."""
    batch: list[PackedRow] = []
    for row in sorted(all_rows, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def to_tensors(batch: list[PackedRow]) -> Batch:
    """Lays a batch out as tensors."""
    length = max(len(row) for row in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    # 0 is the context, 1.. the branches; padding has -1 and sees itself, so that no softmax is over nothing.
    segments = torch.full_like(tokens, -1)
    scored: list[tuple[int, int, int, int]] = []
    for b, row in enumerate(batch):
        fork = end = len(row.context)
        tokens[b, :fork] = torch.tensor(row.context)
        positions[b, :fork] = torch.arange(fork)
        segments[b, :fork] = 0
        for number, (index, continuation) in enumerate(row.branches, start=1):
            read = len(continuation) - 1
            tokens[b, end : end + read] = torch.tensor(continuation[:-1], dtype=torch.int64)
            positions[b, end : end + read] = torch.arange(fork, fork + read)
            segments[b, end : end + read] = number
            columns = [fork - 1, *range(end, end + read)]
            scored += [(b, column, token, index) for column, token in zip(columns, continuation, strict=True)]
            end += read
    branched = any(len(row.branches) > 1 for row in batch)
    return Batch(tokens, positions, _mask(segments) if branched else None, *torch.tensor(scored).unbind(1))


def _mask(segments: torch.Tensor) -> torch.Tensor:
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return ((query == key) | (key == 0)).logical_and(causal)[:, None]
