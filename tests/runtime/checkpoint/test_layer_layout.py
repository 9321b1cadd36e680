"""Layouts by hand: tensors of four by eight and smaller."""

import pytest
import torch

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.catalog.formats import STORAGES
from trimtab.catalog.numbers import NUMBERS
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized, check, dequantize, pack_int4, unpack_int4

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


@pytest.mark.parametrize("name", STORAGES)
def test_modelopts_own_function_writes_the_algorithm_of_its_name(name: str) -> None:
    from modelopt.torch.export.quant_utils import process_layer_quant_config

    row = STORAGES[name]
    told = {"layer.quantization": row.modelopt, "layer.awq_block_size": 32}
    assert process_layer_quant_config(told)["quant_algo"] == name


def test_e4m3_is_what_torch_calls_so() -> None:
    info, row = torch.finfo(torch.float8_e4m3fn), NUMBERS["e4m3"]
    assert (row.largest, 2.0**-row.mantissa, row.bits) == (info.max, info.eps, info.bits)


@pytest.mark.parametrize("algo", [*STORAGES])
def test_factors_are_the_weight(algo: str) -> None:
    generator = torch.Generator().manual_seed(0)
    storage = STORAGES[algo]
    layout = Layout(algo, 32 if storage.scale == "group" else storage.block)
    group = layout.group_size
    shape = {"out": (16, 64), "in": (32, 32), "": (32, 64)}[storage.number.packed]
    weight = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(32, 64 // group, generator=generator) + 0.5 if group else torch.rand(32, generator=generator)
    if layout.dtype == torch.int8:
        weight = weight.view(torch.int8)
    elif not group:
        weight = torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn)
    if storage.scale_type == "e8m0":
        scale = torch.randint(110, 140, scale.shape, generator=generator, dtype=torch.uint8)
    elif storage.scale_type == "e4m3":
        scale = scale.to(torch.float8_e4m3fn)
    scale = scale[:1] if storage.scale == "tensor" else scale
    layer = Quantized(layout, weight, scale, weight_scale_2=torch.tensor(0.037))
    matrix, outer = layer_layout.factors(layer)
    expected = layer_layout.scaled_weight(layer)
    found = matrix.float() * outer[:, None]
    # INT4 times its scale is rounded to bfloat16; elsewhere float32 multiplies in another order.
    relative = 2**-8 if storage.scale_type == "bfloat16" and not storage.second_scale else 1e-6
    assert matrix.dtype == torch.bfloat16 and matrix.shape == (32, 64)
    assert ((found - expected).abs() <= relative * expected.abs()).all() and expected.abs().max() > 0


@pytest.mark.parametrize(
    ("model_type", "name", "kept"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", True),
        ("minimax_m2", "model.layers.1.block_sparse_moe.e_score_correction_bias", True),
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias", True),
        ("ernie4_5_moe", "model.layers.1.mlp.gate.weight", True),
        ("lfm2_moe", "model.layers.1.feed_forward.expert_bias", True),
        ("hunyuan_v1_moe", "model.layers.1.mlp.gate.wg.weight", True),
        ("granitemoe", "model.layers.1.block_sparse_moe.router.layer.weight", True),
        ("jamba", "model.layers.1.mamba.A_log", True),
        ("jamba", "model.layers.1.feed_forward.gate_proj.bias", False),
        ("ernie4_5_moe", "model.layers.1.input_layernorm.weight", False),
    ],
)
def test_what_routers_choose_by_and_states_decay_by_stays_in_float32(model_type, name, kept):
    found = layer_layout.dtype_beside(families.named(model_type), name, torch.float32, torch.bfloat16)
    assert found == (torch.float32 if kept else torch.bfloat16)
