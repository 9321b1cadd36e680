"""What stands between the products of a decoding step, each as one kernel on a GPU.

Here each is written with PyTorch, which is what a CPU runs and what Triton's is tried against when a model is loaded:
one that fails, or computes something else, is not used, and a report says why.

Axes in names: S sequences, N hidden size, F intermediate size, H query heads, K heads of keys and values, D numbers
of a head, P positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.base import progress
from trimtab.runtime.checkpoint import few_bits
from trimtab.runtime.kv_cache import paged
from trimtab.runtime.kv_cache.paged_attention import Pass


@dataclass(frozen=True)
class Angles:
    """The cosines and sines of rotary embeddings (Su et al. 2021, arXiv 2104.09864), [P, D] each: halves turn."""

    cos_PD: torch.Tensor
    sin_PD: torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """What the kernels of one model are tried on."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int


def add_norm(
    x_SN: torch.Tensor, residual_SN: torch.Tensor | None, weight_N: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns RMSNorm of x + residual, and that sum."""
    total_SN = x_SN if residual_SN is None else x_SN + residual_SN
    return F.rms_norm(total_SN, (total_SN.shape[-1],), weight_N, epsilon), total_SN


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up, [S, F], of both side by side, [S, 2 F]."""
    gate_SF, up_SF = gate_up.chunk(2, dim=-1)
    return F.silu(gate_SF) * up_SF


def rotate_and_store(
    qkv: torch.Tensor, angles: Angles, positions_S: torch.Tensor, where: Pass, layer: int
) -> torch.Tensor:
    """Turns queries and keys, [S, (H + 2 K) D] with the values; stores keys and values, returns queries [S, H, D]."""
    kv_heads, size = where.cache.tensors(layer)[0].shape[-2:]
    heads_SHD = qkv.unflatten(-1, (-1, size))
    turning, values = heads_SHD[:, :-kv_heads], heads_SHD[:, -kv_heads:]
    cos, sin = angles.cos_PD[positions_S][:, None], angles.sin_PD[positions_S][:, None]
    low, high = turning.float().chunk(2, dim=-1)
    turned = (turning * cos.float() + torch.cat([-high, low], dim=-1) * sin).to(qkv.dtype)
    where.cache.write(layer, where.slots_T, turned[:, -kv_heads:], values)
    return turned[:, :-kv_heads]


def to_e4m3(x: torch.Tensor, to_codes_1: torch.Tensor) -> torch.Tensor:
    """Returns x times a factor, float32 [1], as e4m3 numbers; beyond their range it saturates."""
    # float32 by the factor's axis, and in one pass over the activations
    return (x * to_codes_1).clamp_(-few_bits.E4M3_MAX, few_bits.E4M3_MAX).to(torch.float8_e4m3fn)


def to_int8(x: torch.Tensor, to_codes: torch.Tensor) -> torch.Tensor:
    """Returns x times factors, float32 [1] or one a column, as whole numbers from -128 to 127."""
    return (x * to_codes).round_().clamp_(-128, 127).to(torch.int8)


@functools.cache
def rounding(name: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns `to_e4m3` or `to_int8`, or on a GPU Triton's in its place."""
    return _replacement(name, device) or globals()[name]


@dataclass
class Kernels:
    """What a step does between its products."""

    add_norm: Callable[..., Any] = add_norm
    silu_mul: Callable[..., Any] = silu_mul
    rotate_and_store: Callable[..., Any] = rotate_and_store


@torch.inference_mode()
def choose(sizes: Sizes, device: torch.device) -> Kernels:
    """Returns the kernels for a model on a device: Triton's where they run and agree."""
    found = Kernels()
    for field in dataclasses.fields(found):
        if function := _replacement(field.name, device, sizes):
            setattr(found, field.name, function)
    return found


def _replacement(name: str, device: torch.device, sizes: Sizes | None = None) -> Callable[..., Any] | None:
    """Returns Triton's function on a GPU where it does what it should, else None, and reports why."""
    if device.type != "cuda":
        return None
    try:
        from trimtab.runtime.kernels import decoding

        function = adapted(decoding)[name]
        reason = try_out(name, function, sizes or Sizes(4, 2, 32, 128, 256), device)
    except Exception as error:  # without Triton, or with one that does not know this card
        reason = _describe(error)
    if reason:
        progress.report("engine", f"{name} runs without a kernel of its own: {reason}")
    return None if reason else function


@functools.cache
def direct(device: torch.device) -> tuple[str | None, ...]:
    """Returns the formats of a KV cache that Triton's kernels read and write; older cards have no e4m3."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    return (None,) if old else (None, "FP8")


def adapted(fast: ModuleType) -> dict[str, Callable[..., Any]]:
    """Returns the functions of `triton_kernels` by the names, and with the arguments, of this module's."""

    def store(qkv: torch.Tensor, angles: Angles, positions: torch.Tensor, where: Pass, layer: int) -> torch.Tensor:
        cache = where.cache
        if cache.algorithm not in direct(qkv.device):
            return rotate_and_store(qkv, angles, positions, where, layer)
        scales = cache.scales(layer) if cache.algorithm else None
        pair = cache.tensors(layer)
        return fast.rotate_and_store(qkv, angles.cos_PD, angles.sin_PD, positions, where.slots_T, *pair, scales)

    same = {name: getattr(fast, name) for name in ("add_norm", "silu_mul", "to_e4m3", "to_int8")}
    return {**same, "rotate_and_store": store}


# ---------------------------------------------------------------------------------------------------- trying them out


def try_out(name: str, function: Callable[..., Any], sizes: Sizes, device: torch.device) -> str:
    """Returns "" where a function computes what this module's does, on random numbers, else what happened."""
    trial, eager = TRIALS[name], globals()[name]
    try:
        found, expected = trial(function, sizes, device), trial(eager, sizes, device)
        for a, b in zip(found, expected, strict=True):
            if not (a.float() - b.float()).norm() <= 0.01 * b.float().norm():  # bfloat16 keeps eight bits
                return "computes other numbers than what it would replace"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler says about a card, or a card about a kernel
        return _describe(error)
    return ""


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _normal(seed: int, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def _try_add_norm(function: Callable[..., Any], sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    x, residual, weight = (_normal(seed, device, 3, sizes.hidden) for seed in range(3))
    return [*function(x, residual, weight[0], 1e-5), *function(x, None, weight[0], 1e-5)]


def _try_silu_mul(function: Callable[..., Any], sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    return [function(_normal(0, device, 3, 2 * sizes.intermediate))]


def _try_to_e4m3(function: Callable[..., Any], sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    factors = torch.tensor([[9.0], [400.0]], device=device)  # within the range, and beyond
    return [function(_normal(0, device, 3, sizes.hidden), factor) for factor in factors]


def _try_to_int8(function: Callable[..., Any], sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    factors = [torch.tensor([9.0], device=device), _normal(1, device, 1, sizes.hidden)[0].float() * 60]
    return [function(_normal(0, device, 3, sizes.hidden), factor) for factor in factors]


def _try_rotate_and_store(function: Callable[..., Any], sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    found = []
    for cache in _caches(sizes, device):
        where, positions = one_token_each(cache, device, [5, 0, 33])
        qkv = _normal(1, device, 3, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim)
        angle = torch.arange(48, device=device)[:, None] / torch.arange(1, 1 + sizes.head_dim // 2, device=device)
        angles = Angles(*(wave.repeat(1, 2).bfloat16() for wave in (angle.cos(), angle.sin())))
        found += [function(qkv, angles, positions, where, 0), *cache.read(0, where.tables_SW)]
    return found


def _caches(sizes: Sizes, device: torch.device) -> list[paged.PagedKVCache]:
    """Caches of one layer in each format that is read directly, with room for 320 tokens."""
    shape = (sizes.kv_heads, sizes.head_dim)
    return [paged.PagedKVCache({0: shape}, 20, 16, device, name, {0: (0.02, 0.03)}) for name in direct(device)]


def one_token_each(cache: paged.PagedKVCache, device: torch.device, positions: list[int]) -> tuple[Pass, torch.Tensor]:
    """One token a sequence at these positions; the sequences share their blocks, in another order each."""
    width = max(positions) // cache.block_size + 1
    tables = torch.stack([(torch.arange(width) + 7 * number) % 20 for number in range(len(positions))])
    at = torch.tensor(positions)
    slots = tables.gather(1, at[:, None] // cache.block_size)[:, 0] * cache.block_size + at % cache.block_size
    slots, tables, lengths, at = (tensor.to(device) for tensor in (slots, tables, at + 1, at))
    return Pass(cache, slots, tables, lengths, []), at


#: Name -> runs a function on random numbers and returns what it computed.
TRIALS = {
    "add_norm": _try_add_norm,
    "silu_mul": _try_silu_mul,
    "to_e4m3": _try_to_e4m3,
    "to_int8": _try_to_int8,
    "rotate_and_store": _try_rotate_and_store,
}
