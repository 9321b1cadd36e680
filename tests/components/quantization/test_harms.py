"""The harm of each format to each group of layers, and what is mixed or left in 16 bits by it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trimtab.components.quantization.mixed import sensitivity
from trimtab.families.fusion import groups
from trimtab.model.facts import inspect
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import few_bits
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.measure import gradients


@pytest.mark.parametrize("number", [1, 3])
def test_the_most_sensitive_groups_stay(number, export, harms, model):
    read = Export(export("int4_rtn", exclude_sensitive=number))
    found = sensitivity.read(harms)
    every = groups([layer.name for layer in inspect(model).linears], "llama")
    worst = sorted(every, key=lambda group: -found[group.layers[0]]["int4_rtn"])[:number]
    kept = {layer.name for layer in inspect(model).linears} - set(read.layers)
    assert kept == {layer for group in worst for layer in group.layers}


def test_mixed_where_the_first_layer_of_a_group_is_excluded(export, model):
    """The harm of a group is kept under k_proj, the first of its layers."""
    read = Export(export("mixed", effective_bits=8, exclude=["lm_head", "*.k_proj"]))
    expected = {layer.name for layer in inspect(model).linears if not layer.name.endswith("k_proj")}
    assert set(read.layers) == expected


@pytest.mark.parametrize("bits", [4.0, 5.5, 8.0])
def test_mixed_keeps_its_budget(bits, export, model):
    read = Export(export("mixed", effective_bits=bits))
    linears = inspect(model).linears
    per_weight = {name: 4 if layout.group_size else 8 for name, layout in read.layers.items()}
    assert set(per_weight) == {layer.name for layer in linears}
    mean = sum(per_weight[layer.name] * layer.parameters for layer in linears) / sum(x.parameters for x in linears)
    assert mean <= bits + 1e-6
    if bits == 5.5:
        assert set(per_weight.values()) == {4, 8}


@pytest.mark.parametrize(("bits", "algos"), [(4.0, {"W4A16_NVFP4", "W4A16_AWQ"}), (6.0, None)])
def test_a_mix_for_gpus_keeps_its_budget_and_leaves_some_in_16_bits(bits, algos, export, model):
    """What ModelOpt calls MIXED_PRECISION: every quantized layer with its own format, whole groups alike, all others
    named as excluded, in both files."""
    folder = export("mixed_gpu", effective_bits=bits)
    read, sizes = Export(folder), {layer.name: layer.parameters for layer in inspect(model).linears}
    mean = sum(size * (read.layers[name].bits if name in read.layers else 16) for name, size in sizes.items())
    assert mean / sum(sizes.values()) <= bits + 1e-6
    for group in groups(sizes, "llama"):
        assert len({read.layers.get(layer) for layer in group.layers}) == 1
    found = {layout.algo for layout in read.layers.values()}
    assert found <= {"W4A16_NVFP4", "W4A16_AWQ", "FP8"} and (algos is None or found == algos)
    own = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    flat = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert own["quant_algo"] == flat["quant_algo"] == "MIXED_PRECISION"
    assert own["quantized_layers"].keys() == read.layers.keys()
    left = {"lm_head", *(name for name in sizes if name not in read.layers)}
    assert {*own["exclude_modules"]} == {*flat["ignore"]} == left
    assert (len(left) > 1) is (bits > 4)
    assert TorchEngine(folder, Engine(), "cpu").kernels().keys() == read.layers.keys()


def test_time_is_a_second_budget(export, model):
    """Where reading and multiplying take as long, weights alone save no time: half of it is FP8 for all."""
    folder = export("mixed_gpu", effective_bits=8, max_time=0.5, step_tokens=206)
    assert {layout.algo for layout in Export(folder).layers.values()} == {"FP8"}


def test_a_mix_rounds_its_fp8_by_gptq_under_the_scales_of_fp8(export):
    """One for layers that engines fuse, which the largest weight of all of them gives."""
    mixed, alone = export("mixed_gpu", effective_bits=8, max_time=0.5, step_tokens=206), export("fp8_gptq")
    found, own, nearest = (Export(folder) for folder in (mixed, alone, export("fp8")))
    for group in groups(found.layers, "llama"):
        for layer in group.layers:
            scales_of = [each.layer(layer).weight_scale for each in (found, own, nearest)]
            assert torch.equal(scales_of[0], scales_of[1]) and torch.equal(scales_of[1], scales_of[2])
            weights = [each.layer(layer).weight.float() for each in (found, own, nearest)]
            assert torch.equal(weights[0], weights[1]) and (weights[1] != weights[2]).float().mean() > 0.02, layer
        assert len({found.layer(layer).weight_scale.item() for layer in group.layers}) == 1


@pytest.mark.parametrize(("form", "left"), [("fp8", 1.0), ("fp8_gptq", sensitivity.GPTQ_LEAVES)])
@pytest.mark.parametrize("names", [("2.mlp.down_proj",), ("1.mlp.gate_proj", "1.mlp.up_proj")])
def test_the_harm_of_layers_counts_both_their_roundings(names, form, left, model, calibration, harms):
    """Against the definition, on the tokens that were kept: of weights each output by itself, as far as GPTQ does not
    make up for it; of inputs what they do to all outputs of all layers that read them."""
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    kept, layers = gradients.samples(model, gradients.enough(tokens), ""), [f"model.layers.{name}" for name in names]
    x, g, share = kept[layers[0]]
    assert len(x) == len(g) and len(x) * share == pytest.approx(1.0, rel=0.2)
    amax = load_file(calibration / "statistics.safetensors")[f"{layers[0]}.amax"].max()
    weights = {layer: Export(model).tensor(f"{layer}.weight").float() for layer in layers}
    largest = max(weight.abs().max() for weight in weights.values())
    rounded = few_bits.round_to("e4m3", x, amax / 448).float()
    expected, moved = 0.0, torch.zeros_like(x)
    for layer, weight in weights.items():
        change = rounded @ (weight - few_bits.round_to("e4m3", weight, largest / 448).float()).t()
        expected += 0.5 * left * share * (kept[layer].gradients * change).square().sum().item()
        moved += kept[layer].gradients @ weight
    expected += 0.5 * share * (moved * (x - rounded)).square().sum().item()
    found = sensitivity.read(harms)
    assert found[layers[0]][form] == pytest.approx(expected, rel=1e-3)
    for each in found.values():
        assert each["int8_wo"] < each["nvfp4_wo"] < each["nvfp4"] and each["int4_gptq"] < each["int4_rtn"]
