"""What stands for a number in few bits, against casts and against the nearest of all numbers that a type has."""

import pytest
import torch

from trimtab.runtime.checkpoint import few_bits


def every_bfloat16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_rounding_to_e4m3_is_what_a_cast_does() -> None:
    """On every bfloat16, and on what lies just beside the middle of two e4m3 numbers."""
    every = every_bfloat16().float()
    every = every[every.isfinite()]
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(0.0))])
    for x in (every, beside, -beside):
        assert torch.equal(few_bits.round_to("e4m3", x, 1.0), few_bits.to_fp8(x, 1.0).float())
    assert few_bits.round_to("e4m3", torch.tensor([float("nan")]), 1.0).isnan()


def test_rounding_to_e2m1_takes_the_nearest_number_and_the_even_code_of_two() -> None:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat([torch.linspace(0, 7, 701), numbers, (numbers[1:] + numbers[:-1]) / 2])
    nearest = (x[:, None] - numbers).abs()
    # argmin takes the first of two equal ones; the even code of two neighbours is the first or the second.
    code = nearest.argmin(-1)
    tie = (nearest == nearest.amin(-1, keepdim=True)).sum(-1) == 2
    expected = numbers[torch.where(tie & (code % 2 == 1), code + 1, code)]
    assert torch.equal(few_bits.round_e2m1(x), expected) and torch.equal(few_bits.round_e2m1(-x), -expected)


@pytest.mark.parametrize("scale", [0.013, 1e-4])
def test_nvfp4_is_e2m1_times_the_e4m3_scale_of_a_block(scale: float) -> None:
    """Also of blocks too small for a scale, or too large for the largest."""
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 5, 30)[:, None]
    blocks = x.view(30, 4, 16)
    of_blocks = few_bits.to_fp8(blocks.abs().amax(-1, keepdim=True) / 6, torch.tensor(scale)).float()
    divisors = (of_blocks * torch.tensor(scale)).clamp_min(torch.finfo(torch.float32).tiny)
    expected = (few_bits.round_e2m1(blocks / divisors) * of_blocks).view(30, 64)
    assert (of_blocks == 0).any() and (of_blocks == few_bits.E4M3_MAX).any()
    assert torch.equal(few_bits.nvfp4_units(x, torch.tensor(scale)), expected)
    in_16_bits = x.bfloat16()
    expected = few_bits.nvfp4_units(in_16_bits.float(), torch.tensor(scale))
    assert torch.equal(few_bits.nvfp4_units(in_16_bits, torch.tensor(scale)), expected)


@pytest.mark.parametrize("numbers", [*few_bits.IN_UNITS])
@pytest.mark.parametrize("scale", [0.03, 2.0**-7, 3e-5])
def test_numbers_in_units_are_exact_in_bfloat16(numbers: str, scale: float) -> None:
    every = every_bfloat16()
    every = every[every.isfinite()].view(-1, 16)[torch.randperm(4080, generator=torch.Generator().manual_seed(0))]
    found = few_bits.IN_UNITS[numbers](every.view(16, -1), torch.tensor(scale))
    assert found.dtype == torch.float32 and torch.equal(found.bfloat16().float(), found)
    assert torch.equal(few_bits.round_to(numbers, every.view(16, -1), torch.tensor(scale)), found * torch.tensor(scale))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_that_of_the_numbers_not_of_their_bits(kind: torch.dtype) -> None:
    x = torch.tensor([[-3.0, 2.0], [0.0, -0.0], [-1e-7, 5e-8], [float("-inf"), 1.0]]).to(kind)
    assert torch.equal(few_bits.largest(x), x.abs().amax(-1, keepdim=True))
    assert few_bits.largest(torch.tensor([[1.0, float("nan")]], dtype=kind)).isnan()
