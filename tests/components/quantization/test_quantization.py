"""Each format's export: what its files hold, how near its weights are to the source, and that the engine runs it."""

from __future__ import annotations

import json
import shutil
from math import prod

import pytest
import torch
from safetensors.torch import load_file

from trimtab.catalog import formats as catalog
from trimtab.families.fusion import groups
from trimtab.model.facts import inspect
from trimtab.model.hardware import target
from trimtab.recipe import Engine, Quantization
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.rounding import folding

from .conftest import FORMATS, quantize


def test_every_format_that_quantizes_is_tried():
    assert FORMATS.keys() == {name for name, row in catalog.FORMATS.items() if row.storage}


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_quantized(name, export, model):
    bits, _ = FORMATS[name]
    read = Export(export(name))
    assert set(read.layers) == {layer.name for layer in inspect(model).linears}
    layers = [read.layer(name) for name in read.layers]
    assert 8 * sum(layer.nbytes for layer in layers) / sum(prod(layer.shape) for layer in layers) <= bits


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_near_their_source(name, export, model):
    read, source = Export(export(name)), Export(model)
    facts, settings = inspect(model), Quantization(format=name)
    folded = folding.makers(groups(read.layers, "llama"), dict.fromkeys(read.layers, name), settings, facts)
    assert len(folded) == (8 if name in ("nvfp4", "nvfp4_wo", "mxfp4_wo") else 0)  # two in each of four blocks
    for group in groups(read.layers, "llama"):
        norm = f"{group.norm}.weight"
        change = read.tensor(norm).float() / source.tensor(norm).float() if group.norm else 1.0
        for layer in group.layers:
            weight, found = source.tensor(f"{layer}.weight").float(), dequantize(read.layer(layer))
            if layer in folded:
                change = folding.widened(row_gains(folded[layer], read, source), weight.shape[1], facts.head_dim)
            if layer in folded.values():
                found = found / row_gains(layer, read, source)[:, None]
            error = (found * change - weight).norm() / weight.norm()
            assert error.item() < FORMATS[name][1], layer


def row_gains(layer: str, read: Export, source: Export) -> torch.Tensor:
    """The source's part in each stored row: by what it was multiplied, but for rounding."""
    weight = source.tensor(f"{layer}.weight").float()
    return (dequantize(read.layer(layer)) * weight).sum(1) / weight.square().sum(1)


@pytest.mark.parametrize("part", ["v_proj", "up_proj"])
def test_a_scale_in_the_layer_before_is_taken_back_in_the_one_behind(part, export, model):
    """Where values and up_proj stay in 16 bits, they show the scale: another for each row, and one for both query
    heads that share a head of values."""
    read, source = Export(export("nvfp4_wo", exclude=["lm_head", f"*.{part}"])), Export(model)
    behind = {"v_proj": "self_attn.o_proj", "up_proj": "mlp.down_proj"}[part]
    before = f"model.layers.1.{behind.partition('.')[0]}.{part}.weight"
    norm = f"model.layers.1.{'input' if part == 'v_proj' else 'post_attention'}_layernorm.weight"
    gains = read.tensor(before).float() / source.tensor(before).float()
    gains *= read.tensor(norm).float() / source.tensor(norm).float()
    assert gains.amax(1).div(gains.amin(1)).max() < 1 + 2**-6 and gains.mean(1).std() > 0.02
    name = f"model.layers.1.{behind}"
    stored, weight = dequantize(read.layer(name)), source.tensor(f"{name}.weight").float()
    inputs = folding.widened(gains.mean(1), weight.shape[1], inspect(model).head_dim)
    found = (stored * weight).sum(0) / weight.square().sum(0)
    assert (found * inputs - 1).abs().median() < 0.05 and (found - 1).abs().median() > 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_the_engine_runs_it(name, export, model, calibration):
    windows = load_file(calibration / "tokens.safetensors")["tokens"].long()
    expected = TorchEngine(model, Engine(), "cpu").nll(windows)
    engine = TorchEngine(export(name), Engine(), "cpu")
    kernels = engine.kernels()
    assert set(kernels) == {layer.name for layer in inspect(model).linears}
    emulated = name in target("cpu").emulated["torch"]
    assert {kernel["emulated"] for kernel in kernels.values()} == {emulated}
    # That every tensor has a place; what a layer computes is tested in tests/runtime/linear/test_linear.py.
    assert engine.nll(windows) == pytest.approx(expected, rel=0.03)


def test_unquantized_tensors_keep_16_bits(export):
    for name in FORMATS:
        read = Export(export(name))
        dtypes = {n: read.tensor(n).dtype for n in read.names if not n.endswith("_scale") and "norm" in n}
        assert set(dtypes.values()) == {torch.bfloat16}


def test_excluded_layers_stay(export, model):
    folder = export("int8_wo", exclude=["lm_head", "*.down_proj"])
    read = Export(folder)
    assert read.layers and not [name for name in read.layers if name.endswith("down_proj")]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(read.tensor(name), Export(model).tensor(name))


def test_an_excluded_layer_makes_up_for_the_scale_in_its_norm(export, model):
    """k_proj reads the same norm as q_proj and v_proj, which AWQ scales: its 16-bit weight is scaled back."""
    read, source = Export(export("int4_awq", exclude=["lm_head", "*.k_proj"])), Export(model)
    name, norm = "model.layers.1.self_attn.k_proj", "model.layers.1.input_layernorm.weight"
    assert name not in read.layers and not torch.equal(read.tensor(norm), source.tensor(norm))
    product = read.tensor(f"{name}.weight").float() * read.tensor(norm).float()
    expected = source.tensor(f"{name}.weight").float() * source.tensor(norm).float()
    torch.testing.assert_close(product, expected, rtol=2**-8, atol=0)


def test_an_excluded_layer_without_a_norm_before_it_stays(model, calibration, tmp_path):
    """Its siblings then multiply their own inputs by pre_quant_scale, and it reads the input as it is."""
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    quantize(other, tmp_path / "q", calibration, format="int4_awq", exclude=["lm_head", "*.k_proj"])
    read, source = Export(tmp_path / "q" / "output"), Export(model)
    attention = "model.layers.1.self_attn"
    assert read.has(f"{attention}.q_proj.pre_quant_scale")
    for name in (f"{attention}.k_proj.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(read.tensor(name), source.tensor(name)), name


CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_the_model_itself(name, export, model):
    dtype = CASTS[name]
    read, source = Export(export(name)), Export(model)
    assert read.layers == {} and read.names == source.names
    assert all(torch.equal(read.tensor(n), source.tensor(n).to(dtype)) for n in read.names)
    assert json.loads((export(name) / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("kv_cache", "largest"), [("fp8", 448), ("int8", 127), ("nvfp4", 448)])
def test_the_scales_of_a_kv_cache_are_those_of_the_measured_ranges(kv_cache, largest, export, calibration):
    read = Export(export("int8_wo", kv_cache=kv_cache))
    ranges = load_file(calibration / "statistics.safetensors")
    assert read.kv_cache_algo == kv_cache.upper()
    for block in range(4):
        attention = f"model.layers.{block}.self_attn"
        for part, kind in (("k_proj.k_scale", "key_amax"), ("v_proj.v_scale", "value_amax")):
            assert read.tensor(f"{attention}.{part}").item() == pytest.approx(ranges[kind][block].item() / largest)
