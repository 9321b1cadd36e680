"""Each format's export: what its files hold, and how near its weights are to the source."""

from __future__ import annotations

import pytest
import torch

from trimtab.components.quantization import sensitivity, work
from trimtab.components.quantization.allocation import BITS
from trimtab.model import inspect
from trimtab.runtime.checkpoint import Export

#: Format -> bits a weight takes with its scales at most (64 features, groups of 32), relative error of a layer at most.
FORMATS = {
    "int8_wo": (8.6, 0.02),
    "int8_sq": (9.1, 0.05),
    "fp8": (8.6, 0.05),
    "int4_rtn": (4.6, 0.2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_quantized(name, export, model):
    bits, _ = FORMATS[name]
    read = Export(export(name))
    assert set(read.layers) == {layer.name for layer in inspect(model).linears}
    assert 16 * read.quantized_bytes / read.bf16_bytes <= bits


@pytest.mark.parametrize("name", ["int8_wo", "fp8", "int4_rtn"])
def test_weights_are_near_their_source(name, export, model):
    read, source = Export(export(name)), Export(model)
    for layer in read.layers:
        weight = source.tensor(f"{layer}.weight").float()
        assert ((read.dequantize(layer) - weight).norm() / weight.norm()).item() < FORMATS[name][1], layer


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


def test_bf16_is_the_model_itself(model, tmp_path):
    metrics = work.quantize(str(model), None, None, str(tmp_path), "", {"format": "bf16"})
    read, source = Export(tmp_path), Export(model)
    assert read.layers == {} and metrics["bytes"] > 0
    assert all(torch.equal(read.tensor(name), source.tensor(name)) for name in read.names)


@pytest.mark.slow
def test_awq_quantizes_every_layer(export, model):
    assert set(Export(export("int4_awq")).layers) == {layer.name for layer in inspect(model).linears}


@pytest.mark.slow
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


@pytest.mark.slow
def test_sensitivity_scores_every_layer_once(search, model):
    found = sensitivity.read(search)
    layers = [layer for group in found for layer in group.layers]
    assert sorted(layers) == sorted(layer.name for layer in inspect(model).linears)
    assert all(set(group.harm) == set(BITS) for group in found)
    assert all(group.harm["int4_awq"] >= group.harm["int8_wo"] >= 0 for group in found)
