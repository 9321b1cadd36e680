"""The scales of a layer: searched, valid of what is all zero, and numbers by their published codes."""

from __future__ import annotations

import pytest
import torch

from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.rounding import quantizers, scales

from .conftest import FORMATS


def test_one_scale_for_several_matrices_is_searched_as_for_one():
    generator, moved = torch.Generator().manual_seed(0), 0
    for _ in range(10):
        parts = [torch.randn(6, 8, generator=generator) for _ in range(3)]
        importance = torch.rand(8, generator=generator)
        together = torch.cat(parts)
        expected = scales.searched(together.reshape(1, -1), scales.FP8, importance.repeat(len(together)))[0]
        found = scales.searched_for_all(iter(parts), together.abs().max(), scales.FP8, importance)
        assert found == expected
        moved += int(found != scales.FP8.scale(together.abs().max()))
    assert moved > 5


def test_codes_of_e2m1():
    """Every number of OCP Microscaling 1.0 and the code that it has there, the even one of a pair lowest."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([positive, -positive[1:], positive[:1]])[None]
    codes = [*range(8), *range(9, 16), 0]
    expected = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert layer_layout.pack_e2m1(numbers)[0].tolist() == expected
    assert torch.equal(layer_layout.unpack_e2m1(layer_layout.pack_e2m1(numbers)), numbers)


SEARCHED = {"nvfp4_wo": 16, "mxfp4_wo": 32}


@pytest.mark.parametrize("pairs", [False, True], ids=["moments", "pairs"])
@pytest.mark.parametrize("form", SEARCHED)
def test_the_scale_of_a_block_is_the_best_of_those_that_can_be_stored(form, pairs):
    """Against every scale within an octave of the largest weight's, by the error of the block's output."""
    size, draw = SEARCHED[form], torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 2 * size, generator=draw), torch.randn(400, 2 * size, generator=draw) ** 3
    x = x @ torch.randn(2 * size, 2 * size, generator=draw)
    gram = x.t() @ x / len(x)
    settings = Quantization(format=form)
    numbers = quantizers.numbers_of(form, [weight])
    importance = gram if pairs else gram.diagonal()
    found = quantizers.row_scales(form, weight, settings, importance, numbers)
    plain = quantizers.row_scales(form, weight, settings, None, numbers)
    moved = 0
    for row in range(6):
        for block in range(2):
            part, here = weight[row, block * size :][:size], slice(block * size, (block + 1) * size)
            counts = gram[here, here] if pairs else gram.diagonal()[here].diag()

            def error(scale, part=part, counts=counts):
                e = numbers.round(part / scale) * scale - part
                return e @ counts @ e

            every = [numbers.stored(plain[row, block] * 2 ** (n / 64)) for n in range(-64, 40)]
            least = min(map(error, every))
            assert error(found[row, block]) <= least * (1 + 1e-4)
            moved += int(found[row, block] != plain[row, block])
    assert moved > 2


@pytest.mark.parametrize("form", SEARCHED)
def test_gptq_on_searched_scales_loses_less_than_nearest_and_that_less_than_by_the_largest_weight(form):
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=draw), torch.randn(600, 64, generator=draw) ** 3
    x = x @ torch.randn(64, 64, generator=draw)
    seen = Input(x.abs().amax(0), x.square().mean(0), x.t() @ x / len(x))
    given = {
        "gptq": (Quantization(format=form), seen),
        "searched": (Quantization(format=form), Input(seen.amax, seen.second_moment)),
        "largest": (Quantization(format=form, method="nearest"), seen),
    }
    errors = {}
    for name, (settings, known) in given.items():
        layer = packed_layers.quantize(form, {"": weight}, known, settings)[""]
        errors[name] = (x @ (dequantize(layer) - weight).t()).square().mean().item()
    assert errors["gptq"] < 0.9 * errors["searched"] < 0.9 * errors["largest"]


@pytest.mark.parametrize("what", ["weights", "one layer of two", "inputs", "weights and inputs"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_all_zero_gets_scales_that_are_valid(form, what):
    """Layers that pruning emptied, and inputs that calibration never saw: finite, positive scales, also in float16."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(64, 64, generator=draw) for name in ("a", "b")}
    x = torch.randn(128, 64, generator=draw)
    if what.startswith("weights"):
        weights = {name: torch.zeros(64, 64) for name in weights}
    if what == "one layer of two":
        weights["a"] = torch.zeros(64, 64)
    if what.endswith("inputs"):
        x = torch.zeros(128, 64)
    settings = Quantization(format=form, group_size=32)
    seen = Input(x.abs().amax(0), x.square().mean(0), x.t() @ x)
    scale = packed_layers.channel_scale(form, weights, seen, settings)
    if scale is not None:
        assert torch.isfinite(scale).all() and (scale > 0).all()
        weights, seen = {name: weight * scale for name, weight in weights.items()}, seen.scaled(scale)
    for name, layer in packed_layers.quantize(form, weights, seen, settings).items():
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            found = layer.tensors.get(part)
            if found is not None and found.dtype != torch.uint8:  # e8m0 is an exponent, and 0 one of them
                assert torch.isfinite(found.float()).all() and (found.half() > 0).all(), part
        back = dequantize(layer)
        assert torch.isfinite(back).all()
        if not weights[name].any():
            assert not back.any()


@pytest.mark.parametrize(("nearest", "form"), [("fp8", "fp8_gptq"), ("int4_rtn", "int4_gptq")])
def test_gptq_leaves_less_error_of_outputs_than_the_nearest_numbers(nearest, form):
    """Of layers that share an input, which is correlated as inputs are; of FP8 they share the scale too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=draw) + 2 * torch.randn(500, 1, generator=draw)
    weights = {name: size * torch.randn(16, 64, generator=draw) for name, size in (("a", 1.0), ("b", 0.3))}
    gram = x.t() @ x / len(x)
    seen = Input(x.abs().amax(0), gram.diagonal().clone(), gram)
    errors = {}
    for each in (nearest, form):
        settings = Quantization(format=each, group_size=32, scale_search="max")
        made = packed_layers.quantize(each, weights, seen, settings)
        differences = {name: dequantize(made[name]) - weight for name, weight in weights.items()}
        errors[each] = {name: float((d @ gram * d).sum()) for name, d in differences.items()}
        if layer_layout.layout_of(each, settings).storage.shares_scale:
            assert made["a"].weight_scale == made["b"].weight_scale == scales.FP8.scale(weights["a"].abs().max())
    assert all(errors[form][name] < 0.7 * errors[nearest][name] for name in weights), errors
