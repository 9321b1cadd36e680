"""Numbers of few bits: what stands for a float32 in INT8, e4m3, E2M1 and NVFP4, in units of a scale or read back.

Numbers in units of a scale have few significant bits, all of which bfloat16 holds: four of e4m3, at most six of NVFP4,
eight of INT8. Times their scale they have as many as float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab.catalog.formats import STORAGES
from trimtab.catalog.numbers import NUMBERS

E4M3_MAX, E2M1_MAX = NUMBERS["e4m3"].largest, NUMBERS["e2m1"].largest
#: Numbers of an input, or of a head of a KV cache, that share a scale in NVFP4.
_BLOCK = STORAGES["NVFP4"].block
#: The bits of a float32 that are its exponent; of a Python number PyTorch would make a tensor each time.
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)


def to_fp8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns float32 x in units of `scale` as e4m3 numbers; beyond their range it saturates."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_units(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns x in units of `scale` as e4m3 represents it, in float32; beyond its range it saturates."""
    if x.device.type == "cpu":  # which casts one number at a time
        return _rounded(_divided(x, scale).clamp_(-E4M3_MAX, E4M3_MAX), 3, 2.0**-6)
    return to_fp8(x.float(), scale).float()


def _divided(x: torch.Tensor, by: torch.Tensor | float) -> torch.Tensor:
    """Returns x / by as a float32 tensor of its own; on a GPU `by` is float32 and has axes."""
    if x.device.type == "cpu":  # which would convert x apart: memory that is new again and again costs more than a pass
        return x.to(torch.float32, copy=True).div_(by)
    return x / by


def _rounded(x: torch.Tensor, bits: int, smallest: float) -> torch.Tensor:
    """Rounds float32 x in place to floating-point numbers with so many bits behind the leading one; ties go to even.

    Added to 1.5 times a power of two that is 2^(23 - bits) above its own, a float32 has room for just those bits.

    Args:
        smallest: normal number of the format; below it steps are no smaller than there.
    """
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(smallest)
    factor = 1.5 * 2 ** (23 - bits)
    return x.add_(power, alpha=factor).sub_(power, alpha=factor)


def to_int8(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns float32 x in units of `scale` as whole numbers from -128 to 127."""
    return int8_units(x, scale).to(torch.int8)


def int8_units(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns x in units of `scale` as whole numbers from -128 to 127, in float32."""
    return (x.float() / scale).round_().clamp_(-128, 127)


def nvfp4_units(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    block_scales: Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns x [..., n] in units of `scale` as NVFP4 represents it, in float32; n a multiple of 16.

    A block too small for e4m3 gets the scale 0, and is read back as zeros whatever its codes are.

    Args:
        block_scales: what computes the same as `nvfp4_block_scales`.
    """
    blocks = x.unflatten(-1, (-1, _BLOCK))
    block_scale = (block_scales or nvfp4_block_scales)(largest(blocks), scale).float()
    above_0 = (block_scale * scale).clamp_min_(torch.finfo(torch.float32).tiny)  # float32, and so is what it divides
    return _rounded(_divided(blocks, above_0).clamp_(-E2M1_MAX, E2M1_MAX), 1, 1.0).mul_(block_scale).flatten(-2)


def nvfp4_block_scales(magnitude: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns the e4m3 scales of blocks in units of `scale`, float32, at which their largest magnitudes become 6."""
    return e4m3_units(magnitude.float() / E2M1_MAX, scale)


def largest(x: torch.Tensor) -> torch.Tensor:
    """Returns the largest magnitude along the last axis, [..., 1] in the type of x; that of NaN is NaN."""
    size = x.abs()
    if x.device.type != "cpu":
        return size.amax(-1, keepdim=True)
    # The bits of positive floating-point numbers are whole numbers in the same order, and of those PyTorch finds the
    # largest in up to half the time.
    return size.view({2: torch.int16, 4: torch.int32}[x.element_size()]).amax(-1, keepdim=True).view(x.dtype)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Returns float32 x as 0, 0.5, 1, 1.5, 2, 3, 4, 6 or their negatives; ties go to the even code."""
    return _rounded(x.clamp(-E2M1_MAX, E2M1_MAX), 1, 1.0)


#: How inputs, keys and values are rounded to a type of number, by its name; e2m1 is that of NVFP4.
IN_UNITS = {"int8": int8_units, "e4m3": e4m3_units, "e2m1": nvfp4_units}


def round_to(numbers: str, x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns x as numbers of a type times `scale` represent it, in float32."""
    return IN_UNITS[numbers](x, scale).mul_(scale)
