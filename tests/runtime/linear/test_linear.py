"""Every packed linear against the float product it stands for, with few rows and with many."""

from dataclasses import replace

import pytest
import torch

from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized, dequantize
from trimtab.runtime.linear import choice, cpu_products

CPU = torch.device("cpu")
# relative to the largest output; bfloat16 has 8 bits (2^-8 = 0.4 %), rounded at most twice
TOLERANCE = 0.01


def quantized(
    algo: str, out_features: int, in_features: int, group_size: int = 0, scaled: bool = False
) -> Quantized:
    generator = torch.Generator().manual_seed(out_features + in_features)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 0.02 + 0.01

    before = torch.rand(in_features, generator=generator) + 0.5 if scaled else None
    if algo == "W4A16_AWQ":
        weight = torch.randint(256, (out_features // 2, in_features), generator=generator, dtype=torch.uint8)
        scale = scales(out_features, in_features // group_size)
        return Quantized(Layout(algo, group_size), weight, scale, pre_quant_scale=before)
    if algo == "FP8":
        weight = torch.randn(out_features, in_features, generator=generator).to(torch.float8_e4m3fn)
        return Quantized(Layout(algo), weight, scales(), scales(), before)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    input_scale = torch.tensor(0.03) if algo == "W8A8_SQ_PER_CHANNEL" else None
    return Quantized(Layout(algo), weight, scales(out_features), input_scale, before)


#: What multiplies INT8 by INT8 here: some processors have no exact instruction for it.
INT8 = choice.Int8Static.name_on(CPU)
#: algo, out, in, group_size, pre_quant_scale -> the kernel that must run it.
CASES = [
    ("W8A16", 48, 64, 0, False, "_weight_int8pack_mm"),
    ("W8A16", 37, 32, 0, True, "_weight_int8pack_mm"),
    ("W8A16", 37, 24, 0, True, "dequantize + mm"),  # the kernel wants sixteenths of columns
    ("W8A8_SQ_PER_CHANNEL", 48, 64, 0, True, INT8),
    ("W8A8_SQ_PER_CHANNEL", 48, 64, 0, False, INT8),
    ("W4A16_AWQ", 64, 64, 64, False, "_weight_int4pack_mm_for_cpu"),
    ("W4A16_AWQ", 208, 128, 32, True, "_weight_int4pack_mm_for_cpu"),  # three blocks of 64 and one of 16
    ("W4A16_AWQ", 192, 256, 128, False, "_weight_int4pack_mm_for_cpu"),
    ("W4A16_AWQ", 40, 64, 32, True, "dequantize + mm"),  # the kernel wants sixteenths of rows
    ("W4A16_AWQ", 32, 64, 16, False, "dequantize + mm"),  # and groups of 32 or more
    ("FP8", 48, 64, 0, False, "dequantize + mm"),
]


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize(("algo", "out_features", "in_features", "group_size", "scaled", "kernel"), CASES)
def test_product(
    algo: str, out_features: int, in_features: int, group_size: int, scaled: bool, kernel: str, rows: int
) -> None:
    layer = quantized(algo, out_features, in_features, group_size, scaled)
    bias = torch.randn(out_features)
    module = choice.build(layer, bias, CPU)
    assert (module.kernel, module.emulated) == (kernel, kernel == "dequantize + mm")
    x = torch.randn(2, rows, in_features).bfloat16()
    y = module(x)
    assert y.shape == (2, rows, out_features)
    assert y.dtype == torch.bfloat16
    expected = rounded(x.float(), layer) @ dequantize(layer).t() + bias
    assert (y.float() - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 7, 200])
@pytest.mark.parametrize("case", CASES)
def test_rows_lie_together_as_behind_a_model_s_own_layer(case: tuple, rows: int, outputs_first, monkeypatch) -> None:
    """Also where float32 is multiplied, outputs first: Llama 4 reads queries as complex numbers."""
    monkeypatch.setattr(cpu_products, "dtype", lambda: torch.float32)
    monkeypatch.setattr(cpu_products, "outputs_first", lambda rows, kind: outputs_first)
    module = choice.build(quantized(*case[:5]), None, CPU)
    module.packed_rows = 0  # as where the packed kernel is slow
    assert module(torch.randn(rows, module.in_features).bfloat16()).is_contiguous()


def rounded(x: torch.Tensor, layer: Quantized) -> torch.Tensor:
    """The activations as the format sees them, in float32, before `pre_quant_scale`."""
    if layer.input_scale is None:
        return x
    before = torch.ones(x.shape[-1]) if layer.pre_quant_scale is None else layer.pre_quant_scale
    scaled = x * before / layer.input_scale
    if layer.layout.algo == "FP8":
        scaled = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        scaled = scaled.round().clamp(-128, 127)
    return scaled * layer.input_scale / before


@pytest.mark.parametrize("case", [c for c in CASES if "pack_mm" in c[5]])
def test_packed_and_dense_paths_agree(case: tuple) -> None:
    module = choice.build(quantized(*case[:5]), None, CPU)
    x = torch.randn(16, case[2]).bfloat16()
    packed, dense = module.packed(x).float(), module.dense(x).float()
    assert (packed - dense).abs().max() < TOLERANCE * dense.abs().max()


def test_a_scale_of_ones_costs_nothing() -> None:
    layer = quantized("W4A16_AWQ", 64, 64, 64)
    ones = replace(layer, pre_quant_scale=torch.ones(64).bfloat16())
    assert choice.build(ones, None, CPU).pre_quant_scale is None
    assert choice.build(replace(layer, pre_quant_scale=torch.full((64,), 0.5)), None, CPU).pre_quant_scale is not None


def test_the_packed_weight_is_the_only_copy() -> None:
    module = choice.build(quantized("W4A16_AWQ", 128, 256, 64), None, CPU)
    assert sum(b.nbytes for b in module.buffers()) == 128 * 256 // 2 + 128 * (256 // 64) * 2 * 2
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_trusted_when_it_computes_the_layer(case: tuple) -> None:
    layer = quantized(*case[:5])
    module = choice.build(layer, None, CPU)
    assert choice._tried(module, layer) is module
    other = replace(layer, weight_scale=layer.weight_scale * 1.2)
    assert choice._tried(module, other) is not module


def test_a_kernel_keeps_the_rows_that_it_runs_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized("W4A16_AWQ", 64, 64, 64)
    module = choice.build(layer, None, CPU)
    module.packed_rows = 128
    assert choice._tried(module, layer) is module and module.packed_rows == 128
    right = type(module).packed

    def small(self: choice.PackedLinear, x_RI: torch.Tensor) -> torch.Tensor:
        if len(x_RI) > 16:
            raise RuntimeError("out of resource: shared memory")
        return right(self, x_RI)

    monkeypatch.setattr(type(module), "packed", small)
    assert choice._tried(module, layer) is module and module.packed_rows == 16
    monkeypatch.setattr(type(module), "packed", lambda self, x_RI: 2 * right(self, x_RI))
    assert isinstance(choice._tried(module, layer), choice.Emulated)
