"""Layouts by hand: tensors of four by eight and smaller."""

import pytest
import torch

from trimtab.errors import Failure
from trimtab.runtime import formats
from trimtab.runtime.formats import Layout, Quantized, check, dequantize, pack_int4, unpack_int4

INT8 = torch.tensor([[-128, -2, -1, 0, 1, 2, 3, 127]] * 4, dtype=torch.int8)
INT4 = Layout("W4A16_AWQ", 4)


def test_int4_bytes_hold_two_output_channels_in_twos_complement() -> None:
    packed = torch.tensor([[0x0F, 0x81, 0x77], [0x2E, 0xF0, 0x00]], dtype=torch.uint8)
    expected = [[-1, 1, 7], [0, -8, 7], [-2, 0, 0], [2, -1, 0]]
    assert unpack_int4(packed).tolist() == expected
    assert unpack_int4(packed).dtype == torch.int8


def test_int4_is_packed_as_modelopt_does() -> None:
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    numbers = torch.randint(-8, 8, (8, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(numbers)
    assert torch.equal(packed, quant_utils.pack_int4_in_uint8(numbers.float(), torch.ones(8, 4), 4))
    assert torch.equal(unpack_int4(packed), numbers)


def test_int4_groups_have_their_own_scale() -> None:
    packed = torch.tensor([[0x21] * 8, [0x43] * 8], dtype=torch.uint8)  # rows of 1, 2, 3 and 4
    scale = torch.tensor([[1.0, 10.0], [0.5, 2.0], [1.0, 1.0], [0.25, 3.0]])
    weight = dequantize(Quantized(INT4, packed, scale))
    assert weight.tolist() == [[1] * 4 + [10] * 4, [1] * 4 + [4] * 4, [3] * 8, [1] * 4 + [12] * 4]


def test_int8_channels_have_their_own_scale_and_the_input_scale_is_multiplied_in() -> None:
    before = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0])
    layer = Quantized(Layout("W8A8_SQ_PER_CHANNEL"), INT8, scale, torch.tensor(0.1), before)
    weight = dequantize(layer)
    assert weight[0].tolist() == [-128, -4, -1, 0, 0.5, 2, 3, 127]
    assert weight[1].tolist() == [-64, -2, -0.5, 0, 0.25, 1, 1.5, 63.5]
    assert weight[2, 7] == 254


def test_fp8_has_one_scale() -> None:
    stored = torch.tensor([[448.0, -0.5], [2**-9, 0.0]]).to(torch.float8_e4m3fn)
    weight = dequantize(Quantized(Layout("FP8"), stored, torch.tensor(0.5), torch.tensor(1.0)))
    assert weight.tolist() == [[224, -0.25], [2**-10, 0]]


def test_bytes_count_weight_and_scales() -> None:
    packed, scale = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(4, 2)
    layer = Quantized(INT4, packed, scale, pre_quant_scale=torch.ones(8, dtype=torch.bfloat16))
    assert (layer.shape, layer.nbytes) == ((4, 8), 16 + 32 + 16)


ONES = torch.ones(4)
DAMAGE = {
    "scale of zero": (
        Quantized(Layout("W8A16"), INT8, torch.tensor([1.0, 0, 1, 1])),
        "weight_scale has values",
    ),
    "scale not finite": (Quantized(Layout("W8A16"), INT8, ONES * torch.nan), "weight_scale has values"),
    "negative scale": (Quantized(Layout("W8A16"), INT8, -ONES), "weight_scale has values"),
    "scale of another shape": (Quantized(Layout("W8A16"), INT8, torch.ones(3)), "shape [3], expected [4]"),
    "no input scale": (Quantized(Layout("W8A8_SQ_PER_CHANNEL"), INT8, ONES), "input_scale is missing"),
    "not quantized": (Quantized(Layout("W8A16"), INT8.float(), ONES), "torch.float32"),
    "group does not divide": (
        Quantized(Layout("W4A16_AWQ", 3), torch.zeros(2, 8, dtype=torch.uint8), torch.ones(4, 2)),
        "group_size 3 is not one for W4A16_AWQ and its 8 inputs",
    ),
    "input scale of another shape": (
        Quantized(Layout("W8A16"), INT8, ONES, pre_quant_scale=torch.ones(4)),
        "pre_quant_scale has shape [4], expected [8]",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    layer, words = DAMAGE[case]
    with pytest.raises(Failure) as caught:
        check("model.layers.0.mlp.up_proj", layer)
    assert caught.value.failure_class == "export_damaged"
    assert words in caught.value.reason
    assert caught.value.reason.startswith("model.layers.0.mlp.up_proj: ")


def test_rounding_to_e4m3_is_what_a_cast_does() -> None:
    """On every bfloat16, and on what lies just beside the middle of two e4m3 numbers."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(0.0))])
    for x in (every, beside, -beside):
        assert torch.equal(formats.round_fp8(x, 1.0), formats.to_fp8(x, 1.0).float())
    assert formats.round_fp8(torch.tensor([float("nan")]), 1.0).isnan()


def test_rounding_to_e2m1_takes_the_nearest_number_and_the_even_code_of_two() -> None:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat([torch.linspace(0, 7, 701), numbers, (numbers[1:] + numbers[:-1]) / 2])
    nearest = (x[:, None] - numbers).abs()
    # argmin takes the first of two equal ones; the even code of two neighbours is the first or the second.
    code = nearest.argmin(-1)
    tie = (nearest == nearest.amin(-1, keepdim=True)).sum(-1) == 2
    expected = numbers[torch.where(tie & (code % 2 == 1), code + 1, code)]
    assert torch.equal(formats._round_e2m1(x), expected) and torch.equal(formats._round_e2m1(-x), -expected)


@pytest.mark.parametrize("algo", [*formats.STORED])
def test_factors_are_the_weight(algo: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = formats.Layout(algo, {"W4A16_AWQ": 32, "W4A8_AWQ": 32, "NVFP4": 16, "W4A8_MXFP4_FP8": 32}.get(algo, 0))
    packed, group = layout.storage.packed, layout.group_size
    shape = {"out": (16, 64), "in": (32, 32), "": (32, 64)}[packed]
    weight = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(32, 64 // group, generator=generator) + 0.5 if group else torch.rand(32, generator=generator)
    if layout.storage.dtype == torch.int8:
        weight = weight.view(torch.int8)
    elif not group:
        weight = torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn)
    if algo == "W4A8_MXFP4_FP8":
        scale = torch.randint(110, 140, scale.shape, generator=generator, dtype=torch.uint8)
    elif algo == "NVFP4":
        scale = scale.to(torch.float8_e4m3fn)
    layer = formats.Quantized(layout, weight, scale[:1] if algo == "FP8" else scale, weight_scale_2=torch.tensor(0.037))
    matrix, outer = formats.factors(layer)
    expected = formats.scaled_weight(layer)
    found = matrix.float() * outer[:, None]
    relative = 2**-8 if algo == "W4A16_AWQ" else 1e-6  # float32 multiplies in another order
    assert matrix.dtype == torch.bfloat16 and matrix.shape == (32, 64)
    assert ((found - expected).abs() <= relative * expected.abs()).all() and expected.abs().max() > 0
