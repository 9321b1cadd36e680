"""The small kernels of a decoding step, in Triton; imported only where Triton is, and used through `small_kernels`.

Axes in names: S sequences, N hidden size, F intermediate size, H query heads, K heads of keys and values, D numbers of
a head, P positions, I in_features, O out_features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _add_norm(
    x, residual, weight, normed, total, size, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * size + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / size + epsilon)
    value = value.to(normed.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * size + columns, value.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    x_SN: torch.Tensor, residual_SN: torch.Tensor | None, weight_N: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `small_kernels.add_norm`."""
    rows, size = x_SN.shape
    normed_SN, add = torch.empty_like(x_SN), residual_SN is not None
    total_SN = torch.empty_like(x_SN) if add else x_SN
    block = triton.next_power_of_2(size)
    given = (x_SN, residual_SN if add else x_SN, weight_N, normed_SN, total_SN, size, epsilon)
    _add_norm[(rows,)](*given, ADD=add, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return normed_SN, total_SN


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * size + columns, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (gate * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `small_kernels.silu_mul`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out_SF = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, 1024))](gate_up, out_SF, size, BLOCK=1024, num_warps=4)
    return out_SF


@triton.jit
def _to_codes(x, factors, out, count, columns, KIND: tl.constexpr, BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BY_COLUMN:
        value *= tl.load(factors + at % columns, mask=inside, other=0.0)
    else:
        value *= tl.load(factors)
    tl.store(out + at, _rounded(value, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(value, KIND: tl.constexpr):
    """Rounds float32 to what a type has; its type stays."""
    if KIND == "fp8":
        value = tl.minimum(tl.maximum(value, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv).to(tl.float32)
    elif KIND == "int8":  # what 1.5 * 2 ** 23 is added to has no bits left for a fraction
        value = (value + 12582912.0) - 12582912.0
        value = tl.minimum(tl.maximum(value, -128.0), 127.0)
    return value


def to_e4m3(x: torch.Tensor, to_codes_1: torch.Tensor) -> torch.Tensor:
    """See `small_kernels.to_e4m3`."""
    return _codes(x, to_codes_1, torch.float8_e4m3fn, "fp8")


def to_int8(x: torch.Tensor, to_codes: torch.Tensor) -> torch.Tensor:
    """See `small_kernels.to_int8`."""
    return _codes(x, to_codes, torch.int8, "int8")


def _codes(x: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype, kind: str) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    count, by_column = x.numel(), factors.numel() > 1
    grid = (triton.cdiv(count, 1024),)
    _to_codes[grid](x, factors, out, count, x.shape[-1], KIND=kind, BY_COLUMN=by_column, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, positions, slots, query, keys, values, key_scale, value_scale,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    source = qkv + (row * (H + 2 * K) + head) * 2 * HALF
    low = tl.load(source + at).to(tl.float32)
    high = tl.load(source + HALF + at).to(tl.float32)
    slot = tl.load(slots + row)
    if head < H + K:
        angles = tl.load(positions + row) * 2 * HALF
        turned = low * tl.load(cos + angles + at) - high * tl.load(sin + angles + at)
        high = high * tl.load(cos + angles + HALF + at) + low * tl.load(sin + angles + HALF + at)
        low = turned
    if head < H:
        query_at = query + (row * H + head) * 2 * HALF + at
        tl.store(query_at, low.to(query.dtype.element_ty))
        tl.store(query_at + HALF, high.to(query.dtype.element_ty))
    else:
        if CODES:  # of what the model's own type holds
            scale = tl.where(head < H + K, key_scale, value_scale)
            low = low.to(qkv.dtype.element_ty).to(tl.float32) / scale
            high = high.to(qkv.dtype.element_ty).to(tl.float32) / scale
            low = tl.minimum(tl.maximum(low, -E4M3_MAX), E4M3_MAX)
            high = tl.minimum(tl.maximum(high, -E4M3_MAX), E4M3_MAX)
        if head < H + K:
            key_at = keys + (slot * K + head - H) * 2 * HALF + at
            tl.store(key_at, low.to(keys.dtype.element_ty))
            tl.store(key_at + HALF, high.to(keys.dtype.element_ty))
        else:
            value_at = values + (slot * K + head - H - K) * 2 * HALF + at
            tl.store(value_at, low.to(values.dtype.element_ty))
            tl.store(value_at + HALF, high.to(values.dtype.element_ty))


def rotate_and_store(
    qkv: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_S: torch.Tensor,
    slots_S: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: tuple[float, float] | None = None,
) -> torch.Tensor:
    """See `small_kernels.rotate_and_store`."""
    kv_heads, size = keys.shape[-2:]
    rows, heads = qkv.shape[0], qkv.shape[1] // size - 2 * kv_heads
    query_SHD = qkv.new_empty(rows, heads, size)
    given = (qkv, cos_PD, sin_PD, positions_S, slots_S, query_SHD, keys, values, *(scales or (1.0, 1.0)))
    shape = {"H": heads, "K": kv_heads, "HALF": size // 2, "CODES": scales is not None}
    _rotate_and_store[(rows, heads + 2 * kv_heads)](*given, **shape, num_warps=1)
    return query_SHD


@triton.jit
def _matvec(
    x, weight, scale, to_codes, bias, y, rows, columns,
    ROUND: tl.constexpr, BY_COLUMN: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    start = row.to(tl.int64)[:, None] * columns
    sums = tl.zeros([OUT, IN], tl.float32)
    for begin in range(0, columns, IN):
        column = begin + tl.arange(0, IN)
        if EVEN:
            value = tl.load(x + column).to(tl.float32)
            w = tl.load(weight + start + column[None, :], eviction_policy="evict_first")
        else:
            value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            w = tl.load(weight + start + column[None, :], mask=inside, other=0.0)
        if ROUND != "":
            if BY_COLUMN:
                value *= tl.load(to_codes + column, mask=column < columns, other=0.0)
            else:
                value *= tl.load(to_codes)
        value = _rounded(value, ROUND)
        sums += w.to(tl.float32) * value[None, :]
    found = tl.sum(sums, 1)
    inside = row < rows
    if SCALED == "by row":
        found *= tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    elif SCALED == "once":
        found *= tl.load(scale)
    if BIASED:
        found += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row, found.to(y.dtype.element_ty), mask=inside)


def matvec(
    x_1I: torch.Tensor,
    weight: torch.Tensor,
    block: tuple[int, int, int],
    scale: torch.Tensor | None = None,
    to_codes: torch.Tensor | None = None,
    rounding: str = "",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x @ weight.T of one row, [1, O] in x's type.

    Args:
        weight: [O, I].
        block: outputs and inputs that a program has at a time, powers of two, and its warps.
        scale: float32 [1], or [O], of the outputs.
        to_codes: float32 [1], or [I], that the input is multiplied by before it is rounded.
        rounding: "fp8" or "int8", of the input; "" leaves it as it is.
    """
    rows, columns = weight.shape
    outputs, inputs, warps = block
    y_1O = x_1I.new_empty(1, rows)
    scaled = "" if scale is None else "once" if scale.numel() == 1 else "by row"
    given = [x_1I if tensor is None else tensor for tensor in (scale, to_codes, bias)]
    _matvec[(triton.cdiv(rows, outputs),)](
        x_1I, weight, *given, y_1O, rows, columns,
        ROUND=rounding, BY_COLUMN=to_codes is not None and to_codes.numel() > 1, SCALED=scaled,
        BIASED=bias is not None, EVEN=rows % outputs == 0 and columns % inputs == 0,
        OUT=outputs, IN=inputs, num_warps=warps,
    )  # fmt: skip
    return y_1O
