"""Attention over a paged KV cache in one Triton kernel a layer, which reads a block where it lies.

PyTorch's attention wants keys and values side by side, so the path of `runtime.kv_cache.paged_attention` copies every
sequence's blocks together first, padded to the longest: at mixed lengths several times the bytes that attention
needs. Here a program takes a span, that is, a few tokens of one sequence and the query heads that share a head of
keys; it walks the sequence's table with the softmax of Milakov and Gimelshein (2018, arXiv 1805.02867), as
FlashAttention does (Dao et al. 2022, arXiv 2205.14135). A lone token's keys are shared out among several programs,
whose results are merged (Flash-Decoding, Dao et al. 2023), for else a small batch would leave most of a GPU idle.

One kernel serves tokens that decode and prompts that are read, in any mixture: so a step has one shape, whatever is in
it, and can be recorded. FP8 and INT8 are widened as they are read, bit for bit to what `PagedKVCache.read` gives.

Axes in names: T packed tokens, H query heads, K heads of keys and values, D numbers of a head, B spans, W blocks of a
table, S sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimtab.runtime.kernels.spans import Spans

#: Keys that a program reads at a time.
KEYS = 64
#: Programs that fill a large GPU a few times.
PROGRAMS = 512
#: Keys of a lone token that a program reads alone at most, or one long sequence would run on at the end of a launch.
ALONE = 2048
MAX_PARTS = 64
#: The type of a product's factors; the interpreter takes the bits of bfloat16 for integers.
FACTORS = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
LOG2_E = 1.4426950408889634
#: What a masked score is, finite so that a row that has seen nothing yet does not become NaN.
NOTHING = tl.constexpr(-1e30)


def attend(
    query_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: Spans,
    scale: float,
    scales: tuple[float, float] = (1.0, 1.0),
    window: int | None = None,
) -> torch.Tensor:
    """Returns the attention of every token that a span has, and zeros for others, [T, H, D].

    Args:
        keys, values: [blocks, block_size, K, D] in bfloat16, e4m3 or int8; those of the tokens are in them.
        scale: of the scores.
        scales: of the codes of keys and of values.
        window: tokens that a token may look back at, with itself; None is all.
    """
    tokens, heads, size = query_THD.shape
    group = heads // keys.shape[2]
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    count = len(spans.spans_B4)
    each = spans.tokens == 1 and count == tokens
    make = torch.empty if each else torch.zeros
    found = make(tokens, heads, size, dtype=query_THD.dtype, device=query_THD.device)
    parts = parts_of(count * keys.shape[2], spans.tables_SW.shape[1] * keys.shape[1]) if spans.tokens == 1 else 1
    shape = (parts, tokens, heads) if parts > 1 else (1, 1, 1)
    sums = torch.empty(*shape, size, dtype=torch.float32, device=query_THD.device)
    states = torch.empty(*shape, 2, dtype=torch.float32, device=query_THD.device)
    padded = max(16, triton.next_power_of_2(size))
    rows = max(16, triton.next_power_of_2(group * spans.tokens))
    _attend[count, keys.shape[2], parts](
        found, query_THD, keys, values, spans.spans_B4, spans.tables_SW, sums, states,
        query_THD.stride(0), query_THD.stride(1), keys.stride(1), keys.stride(2), spans.tables_SW.stride(0),
        tokens, heads, scale * LOG2_E, *scales,
        GROUP=group, SIZE=size, PADDED=padded, ROWS=rows, KEYS=KEYS, BLOCK=keys.shape[1], WINDOW=window or 0,
        PARTS=parts, EACH=each, CODES=keys.dtype != query_THD.dtype, FACTORS=FACTORS, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        _merge[count, heads](
            found, sums, states, spans.spans_B4, tokens, heads,
            SIZE=size, PADDED=padded, PARTS=parts, EACH=each, num_warps=1 if parts <= 16 else 4,
        )  # fmt: skip
    return found


def parts_of(programs: int, keys: int) -> int:
    """Returns into how many parts, a power of 2, the keys of lone tokens are cut: idle cores would wait otherwise.

    Args:
        programs: of a launch that cuts nothing.
        keys: of the longest sequence.
    """
    wanted = max(-(-PROGRAMS // programs), -(-keys // ALONE))
    return min(MAX_PARTS, triton.next_power_of_2(wanted), triton.next_power_of_2(-(-keys // KEYS)))


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    found, query, keys, values, spans, tables, sums, states,
    query_token, query_head, key_token, key_head, table_row,
    tokens, heads, scale, key_scale, value_scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr, CODES: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    span = spans + 4 * tl.program_id(0)
    head, part = tl.program_id(1), tl.program_id(2)
    first, count, position, sequence = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    if count == 0:
        if EACH and PARTS == 1:
            _nothing(found, tl.program_id(0) * heads + head * GROUP, GROUP, SIZE, PADDED)
        return
    row = tl.arange(0, ROWS)  # a token's query heads stand together
    token, query_of_row = row // GROUP, head * GROUP + row % GROUP
    number = tl.arange(0, PADDED)
    is_row, is_number = token < count, number < SIZE
    at_query = (first + token).to(tl.int64) * query_token + query_of_row * query_head
    q = tl.load(query + at_query[:, None] + number[None, :], mask=is_row[:, None] & is_number[None, :], other=0.0)
    own = position + token

    start = 0
    if WINDOW:
        start = tl.maximum(position + 1 - WINDOW, 0) // KEYS * KEYS
    stop = position + count
    each = tl.cdiv(tl.cdiv(stop - start, KEYS), PARTS) * KEYS
    start += part * each
    stop = tl.minimum(stop, start + each)

    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_of_values = tl.zeros([ROWS, PADDED], tl.float32)
    for begin in range(start, stop, KEYS):
        key = begin + tl.arange(0, KEYS)
        is_key = key < stop
        block = tl.load(tables + sequence * table_row + key // BLOCK, mask=is_key, other=0)
        at_key = (block.to(tl.int64) * BLOCK + key % BLOCK) * key_token + head * key_head
        is_there = is_key[:, None] & is_number[None, :]
        k = tl.load(keys + at_key[:, None] + number[None, :], mask=is_there, other=0.0)
        v = tl.load(values + at_key[:, None] + number[None, :], mask=is_there, other=0.0)
        if CODES:
            k = (k.to(tl.float32) * key_scale).to(q.dtype)
            v = (v.to(tl.float32) * value_scale).to(q.dtype)
        scores = tl.dot(q.to(FACTORS), tl.trans(k.to(FACTORS))) * scale  # powers of two, not of e
        is_seen = is_key[None, :] & (key[None, :] <= own[:, None])
        if WINDOW:
            is_seen = is_seen & (key[None, :] > own[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, NOTHING)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        sum_of_values = sum_of_values * shrink[:, None] + tl.dot(weights.to(FACTORS), v.to(FACTORS))
        largest = new_largest

    at_token = (first + token).to(tl.int64) * heads + query_of_row
    is_stored = is_row[:, None] & is_number[None, :]
    if PARTS == 1:
        average = sum_of_values / total[:, None]
        tl.store(found + at_token[:, None] * SIZE + number[None, :], average.to(found.dtype.element_ty), mask=is_stored)
    else:
        at_part = part.to(tl.int64) * tokens * heads + at_token
        tl.store(sums + at_part[:, None] * SIZE + number[None, :], sum_of_values, mask=is_stored)
        tl.store(states + 2 * at_part, largest, mask=is_row)
        tl.store(states + 2 * at_part + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    found, sums, states, spans, tokens, heads,
    SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of spans of one token: the parts' sums, each weighed by what its largest score is beside the largest of all."""
    span = spans + 4 * tl.program_id(0)
    if tl.load(span + 1) == 0:
        if EACH:
            _nothing(found, tl.program_id(0) * heads + tl.program_id(1), 1, SIZE, PADDED)
        return
    part, number = tl.arange(0, PARTS), tl.arange(0, PADDED)
    at_token = tl.load(span).to(tl.int64) * heads + tl.program_id(1)
    at_part = part.to(tl.int64) * tokens * heads + at_token
    largest = tl.load(states + 2 * at_part)
    weight = tl.exp2(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(states + 2 * at_part + 1), 0)
    is_number = number < SIZE
    of_part = tl.load(sums + at_part[:, None] * SIZE + number[None, :], mask=is_number[None, :], other=0.0)
    average = tl.sum(weight[:, None] * of_part, 0) / total
    tl.store(found + at_token * SIZE + number, average.to(found.dtype.element_ty), mask=is_number)


@triton.jit
def _nothing(found, first, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Writes zeros for so many heads of a token that nobody reads: it may not be NaN, which a cache would keep."""
    number = tl.arange(0, PADDED)
    for row in range(rows):
        at = found + (first + row).to(tl.int64) * SIZE + number
        tl.store(at, tl.zeros([PADDED], found.dtype.element_ty), mask=number < SIZE)
