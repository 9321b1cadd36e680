"""Products on a CPU are those of the stored numbers, in whichever type the processor multiplies and in any tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized, dequantize, scaled_weight
from trimtab.runtime.linear import choice, cpu_products
from trimtab.runtime.rounding import inputs, quantizers

CPU = torch.device("cpu")
#: A processor that has AVX2, and neither AVX-512 nor instructions for bfloat16, as PyTorch and its libraries see one.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip
#: Half the distance of two bfloat16 numbers, which have eight bits, relative to them: what rounding once may cost.
ROUNDING = 2**-8


@pytest.fixture(params=["float32", "float32, outputs first", "bfloat16", "bfloat16, outputs first"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each type and order, as if this processor were the faster with it; tiles that layers of tests have several of."""
    name, _, turned = request.param.partition(", ")
    monkeypatch.setattr(cpu_products, "dtype", lambda: getattr(torch, name))
    monkeypatch.setattr(cpu_products, "outputs_first", lambda rows, kind: bool(turned))
    monkeypatch.setattr(cpu_products, "TILE", 64 * 64)
    return getattr(torch, name)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64, 65, 300])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (63, 40), (64, 64), (333, 96)])
def test_a_layer_computes_its_float32_product(
    kind: torch.dtype, outputs: int, inputs: int, batch: int, rows: int
) -> None:
    x, weight, bias = normal(batch, rows, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    found = cpu_products.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (batch, rows, outputs) and found.is_contiguous()
    expected = F.linear(x.double(), weight.double(), bias.double())
    # PyTorch rounds before the bias too where it multiplies bfloat16 itself.
    terms = F.linear(x.double(), weight.double()).abs() + bias.double().abs()
    assert ((found.double() - expected).abs() <= 1.01 * ROUNDING * (expected.abs() + terms) + 1e-5).all()


def test_only_the_output_is_rounded(kind: torch.dtype) -> None:
    x, weight = normal(80, 200), normal(130, 200, seed=1)
    exact = F.linear(x.double(), weight.double())
    assert (cpu_products.exact(x, weight).double() - exact).abs().max() < 1e-5
    wrong = (cpu_products.linear(x, weight).double() - exact).abs() > 1.01 * ROUNDING * exact.abs() + 1e-5
    assert not wrong.any()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 65, 300])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (1, 40), (63, 40), (64, 64), (160, 333)])
def test_a_weight_laid_out_has_the_same_product_in_as_many_bytes(
    kind: torch.dtype, outputs: int, inputs: int, threads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed by threads that each have a part of the outputs, if there are enough."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight, bias = normal(rows, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    laid_out = cpu_products.laid_out(weight)
    assert torch.equal(laid_out, weight) and laid_out.untyped_storage().nbytes() == weight.nbytes
    found = cpu_products.quickest(x, laid_out)
    assert found.shape == (rows, outputs)
    exact = F.linear(x.double(), weight.double())
    once = ROUNDING if found.dtype == torch.bfloat16 else 0
    sums = 2e-6 * F.linear(x.double().abs(), weight.double().abs())  # of float32
    assert ((found.double() - exact).abs() <= once * exact.abs() + sums).all()
    assert torch.allclose(cpu_products.linear(x, laid_out, bias), cpu_products.linear(x, weight, bias), 0.03, 0.03)


@pytest.mark.parametrize("scales", [1, 130])
@pytest.mark.parametrize("rows", [1, 2, 80])
def test_a_scale_multiplies_in_float32(kind: torch.dtype, scales: int, rows: int) -> None:
    """One for all, too, which bfloat16 would round by up to 0.4 %."""
    x, weight, scale = normal(rows, 200), normal(130, 200, seed=1), torch.linspace(1.0038, 1.9, scales)
    expected = (cpu_products.quickest(x, weight).float() * scale).bfloat16()
    assert torch.equal(cpu_products.scaled(x, weight, scale if scales > 1 else scale.reshape(())), expected)


def test_layers_of_a_model_are_replaced_with_their_weights(kind: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(48, 96, dtype=torch.bfloat16), nn.Linear(96, 8, dtype=torch.float32))
    weights = [layer.weight for layer in model]
    x = normal(70, 48)
    with torch.no_grad():
        expected = model[0](x).float()
        cpu_products.use(model)
        assert [layer.weight for layer in model] == weights and all(isinstance(layer, nn.Linear) for layer in model)
        assert (model[0](x).float() - expected).abs().max() <= 2 * ROUNDING * expected.abs().max()
        assert torch.equal(model[1](expected), F.linear(expected, weights[1], model[1].bias)), "float32 stays float32"


#: Formats without a kernel on a CPU that round their inputs, and whether at a scale of calibration.
EMULATED = [("fp8", True), ("fp8", False), ("fp8_per_channel", False), ("w4a8_awq", True), ("mxfp4", True),
            ("nvfp4", True), ("nvfp4", False)]  # fmt: skip


def emulated(form: str, measured: bool, outputs: int = 48) -> Quantized:
    settings = Quantization(format=form, **({"group_size": 64} if form == "w4a8_awq" else {}))
    layer = quantizers.round_weights(form, {"": normal(outputs, 128)}, settings)[""]
    return replace(layer, input_scale=torch.tensor(0.0123) if measured else None)


def inputs_of_all_sizes(rows: int) -> torch.Tensor:
    """Beyond the range of e4m3 and of its blocks, too small for both, and zeros."""
    x_RI = normal(rows, 128) * torch.logspace(-6, 3, 128)[torch.randperm(128, generator=torch.Generator())]
    x_RI[0, :16] = 0
    return x_RI.bfloat16()


@pytest.mark.parametrize(("form", "measured"), EMULATED)
@pytest.mark.parametrize("rows", [1, 2, 3, 40, 200])
def test_an_emulated_product_is_that_of_the_format(kind: torch.dtype, form: str, measured: bool, rows: int) -> None:
    """All that is rounded besides is the output, in bfloat16: once, or where that is what was multiplied, twice."""
    layer = emulated(form, measured)
    x_RI = inputs_of_all_sizes(rows)
    module = choice.build(layer, None, CPU)
    assert module.emulated
    seen_RI = inputs.rounded(layer.layout.storage.inputs, x_RI.float(), layer.input_scale)
    weight_OI = scaled_weight(layer)
    exact = F.linear(seen_RI.double(), weight_OI.double())
    sums = 2e-6 * F.linear(seen_RI.double().abs(), weight_OI.double().abs())  # of float32
    assert ((module(x_RI).double() - exact).abs() <= 2.02 * ROUNDING * exact.abs() + sums).all()


@pytest.mark.parametrize(("form", "measured"), EMULATED)
def test_inputs_are_looked_up_as_they_are_rounded(form: str, measured: bool) -> None:
    module, x_RI = choice.build(emulated(form, measured), None, CPU), inputs_of_all_sizes(50)
    assert (module.table is not None) == measured
    rounding = module.layout.storage.inputs
    found_RI, _ = inputs.in_units(rounding, x_RI, module.input_scale, module.table)
    expected_RI, scale = inputs.in_units(rounding, x_RI.float(), module.input_scale)
    assert torch.equal(found_RI, expected_RI)
    assert torch.equal(inputs.rounded(rounding, x_RI, module.input_scale), expected_RI.float() * scale)


@pytest.mark.parametrize(("form", "measured"), EMULATED)
def test_inputs_are_rounded_some_rows_at_a_time(form: str, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale that is no part's own: the largest number stands in the last row."""
    layer = emulated(form, measured)
    module = choice.build(layer, None, CPU)
    x_RI = normal(200, 128)
    x_RI[-1, 3] = 50.0
    expected_RI = inputs.rounded(layer.layout.storage.inputs, x_RI, layer.input_scale)
    expected_RO = module(x_RI)
    monkeypatch.setattr(inputs, "AT_ONCE", 16 * 128)
    found_RI = inputs.rounded(layer.layout.storage.inputs, x_RI, layer.input_scale)
    assert torch.equal(found_RI, expected_RI) and not torch.equal(expected_RI, x_RI.float())
    assert torch.equal(module(x_RI), expected_RO)


@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(64, 64, 64), (208, 128, 32), (400, 256, 128), (48, 64, 32), (48, 160, 32), (16, 416, 32)],
)
def test_packed_int4_is_read_in_tiles(kind: torch.dtype, outputs: int, inputs: int, group: int) -> None:
    """Of some outputs and, where sums are in float32, some groups of inputs; of the last tile there are fewer."""
    layer = int4(outputs, inputs, group)
    module = choice.build(layer, None, CPU)
    for rows in (3, 90):
        x = normal(rows, inputs)
        expected = F.linear(x.double(), dequantize(layer).double())
        # In bfloat16 each scaled weight is rounded, so the bound is relative to the sum of magnitudes.
        weights = F.linear(x.double().abs(), dequantize(layer).double().abs()) if kind == torch.bfloat16 else 0
        bound = 1.01 * ROUNDING * (expected.abs() + weights) + 1e-5
        assert ((module.dense(x).double() - expected).abs() <= bound).all()


def int4(outputs: int, inputs: int, group: int) -> Quantized:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randint(256, (outputs // 2, inputs), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(outputs, inputs // group, generator=generator) * 0.02 + 0.01).bfloat16()
    return Quantized(Layout("W4A16_AWQ", group), weight, scale)


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_int8_products_do_not_saturate(monkeypatch: pytest.MonkeyPatch, multiplies: bool, rows: int) -> None:
    chosen = cpu_products._integers_are_exact if multiplies else lambda: False  # even where that is slow
    monkeypatch.setattr(cpu_products, "multiplies_integers", chosen)
    assert saturation(rows) <= 2.01 * ROUNDING


def test_a_slow_loop_for_int8_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return x.int() @ w.int()

    monkeypatch.setattr(torch, "_int_mm", loop)
    cpu_products.multiplies_integers.cache_clear()
    try:
        assert not cpu_products.multiplies_integers()
        assert choice.Int8Static.name_on(CPU) == "float32 products of INT8"
        assert saturation(7) <= 2.01 * ROUNDING
    finally:
        cpu_products.multiplies_integers.cache_clear()


def saturation(rows: int) -> float:
    """The largest relative error of INT8 activations and weights that are as large as they can be."""
    one, found = torch.tensor(1.0), []
    for a, w in ((127, 127), (127, -128), (-128, 127), (-128, -128)):
        weight = torch.full((32, 256), w, dtype=torch.int8)
        module = choice.build(Quantized(Layout("W8A8_SQ_PER_CHANNEL"), weight, one.expand(32), one), None, CPU)
        y = module(torch.full((rows, 256), a).bfloat16()).float()
        found.append((y / (256 * a * w) - 1).abs().max().item())
    return max(found)


def test_a_kernel_without_vector_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = int4(64, 64, 32)
    monkeypatch.setattr("trimtab.runtime.linear.cpu._fast", {"_weight_int4pack_mm_for_cpu": False})
    module = choice.build(layer, None, CPU)
    assert module.packed_rows == 0
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", None)
    assert torch.isfinite(module(normal(1, 64))).all()


def test_a_processor_with_avx2_alone_computes_the_same_numbers() -> None:
    """There oneDNN's INT8 product saturates, and PyTorch's bfloat16 product is a loop of ten times float32's time."""
    run = [sys.executable, __file__]
    done = subprocess.run(run, env={**os.environ, **AVX2}, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found["capability"] != "AVX2":
        pytest.skip("this processor is not of x86-64 with AVX2")
    assert found["dtype"] == "torch.float32"
    assert max(found["int8"]) <= 2.01 * ROUNDING
    assert found["int4"] <= 0.01
    assert max(found["emulated"].values()) <= 2.02 * ROUNDING, found["emulated"]


def main() -> None:
    """What the process with AVX2 alone finds."""
    layer = int4(208, 128, 32)
    x = normal(90, 128)
    expected = F.linear(x.float(), dequantize(layer))

    def largest_error(form: str, measured: bool, rows: int) -> float:
        layer = emulated(form, measured)
        seen_RI = inputs.rounded(layer.layout.storage.inputs, x[:rows].float(), layer.input_scale)
        exact = F.linear(seen_RI.double(), scaled_weight(layer).double())
        change = (choice.build(layer, None, CPU)(x[:rows]).double() - exact).abs()
        return (change / (exact.abs() + 1e-3)).max().item()  # sums near 0 have the error of float32
    with torch.inference_mode():
        found = {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "dtype": str(cpu_products.dtype()),
            "int8": [saturation(rows) for rows in (1, 7, 200)],
            "emulated": {str((*of, rows)): largest_error(*of, rows) for of in EMULATED for rows in (1, 2, 4, 90)},
            "int4": ((choice.build(layer, None, CPU)(x).float() - expected).norm() / expected.norm()).item(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
