"""Quantization-aware distillation: training sees the numbers that quantization will store."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.distillation import work
from trimtab.components.distillation.weights.quantization_aware import QuantizationAware, Rounding
from trimtab.components.pruning.work import prune
from trimtab.components.quantization.work import quantize
from trimtab.recipe import CALIBRATED_FORMATS, NEAREST_FORMATS, Quantization
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure import observe
from trimtab.runtime.rounding import inputs

SETTINGS = {"tokens": 6 * 4 * 32, "batch_size": 4, "length": 32, "learning_rate": 0.001}


def test_rounding_by_hand():
    """INT8: a row whose largest weight is 127 has the scale 1, and its weights become whole numbers."""
    layer = nn.Linear(8, 4, bias=False)
    rows = torch.tensor([127.0, 0.4, -0.4, 0.75, -3.25, 2.0, 100.75, -64.0])
    layer.weight.data = torch.stack([rows, 2 * rows, -rows, rows / 2])
    parametrize.register_parametrization(layer, "weight", Rounding(Quantization(format="int8_wo"), []))
    whole = torch.tensor([127.0, 0, 0, 1, -3, 2, 101, -64])
    assert torch.equal(layer.weight, torch.stack([whole, 2 * whole, -whole, whole / 2]))
    coefficients = torch.arange(32.0).reshape(4, 8)
    (coefficients * layer.weight).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, coefficients), "straight through"


@pytest.mark.parametrize("form", NEAREST_FORMATS)
def test_the_export_holds_what_training_saw(form, model, calibration, tmp_path):
    """Bit for bit, for students that training moved off bfloat16's numbers, with some of a group excluded."""
    method = "nearest" if form in CALIBRATED_FORMATS else None
    settings = Quantization(format=form, group_size=32, exclude=("lm_head", "*.v_proj"), method=method)
    student, _ = model_files.load(model, torch.float32)
    layers = observe.linears(student)
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        layer.weight.data *= 1 + 0.01 * torch.randn(layer.weight.shape, generator=generator)
    change = QuantizationAware(settings, {name for name in layers if not name.endswith("v_proj")})
    change.attach(student)
    seen = {name: layer.weight.detach() for name, layer in layers.items() if not name.endswith("v_proj")}
    change.finish(student)
    plain, export = tmp_path / "plain", tmp_path / "export"
    model_files.save(student.bfloat16(), plain, model)
    export.mkdir()
    measured = str(rebound(calibration, plain, tmp_path)) if settings.needs_statistics else None
    quantize(str(plain), measured, None, str(export), str(tmp_path / "scratch"), settings.model_dump(mode="json"))
    stored = Export(export)
    assert set(stored.layers) == set(seen)
    for name, weight in seen.items():
        assert torch.equal(dequantize(stored.layer(name)), weight), name


def rebound(calibration, plain, folder):
    """The statistics, measured on the student."""
    from trimtab.components.calibration.work import calibrate

    (folder / "calibration").mkdir()
    calibrate(str(plain), str(folder / "calibration"), "", {"samples": 2, "length": 32})
    return folder / "calibration"


ROUNDING_INPUTS = [form for form in NEAREST_FORMATS if FORMATS[form].storage.inputs]


@pytest.mark.parametrize("form", ROUNDING_INPUTS)
def test_what_a_layer_reads_is_rounded_as_the_export_rounds_it(form, model, calibration, tmp_path):
    """On the text that calibrated the export, whose static scales are then those of training."""
    settings = Quantization(format=form, method="nearest" if form in CALIBRATED_FORMATS else None)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    student, _ = model_files.load(model, torch.float32)
    layers, name = observe.linears(student), "model.layers.0.self_attn.q_proj"  # which reads what no rounding changed
    change, read = QuantizationAware(settings, set(layers), with_inputs=True), []
    layers[name].register_forward_pre_hook(lambda _, given: read.append(given[0].detach()))
    change.attach(student)
    layers[name].register_forward_hook(lambda _, given, __: read.append(given[0].detach()))
    student(tokens).logits.square().sum().backward()
    weights = [layer.parametrizations.weight.original for layer in layers.values()]
    assert all(weight.grad.abs().sum() > 0 for weight in weights), "straight through"
    export = tmp_path / "export"
    export.mkdir()
    measured = str(calibration) if settings.needs_statistics else None
    quantize(str(model), measured, None, str(export), str(tmp_path / "scratch"), settings.model_dump(mode="json"))
    plain, rounded = read
    scale = Export(export).layer(name).input_scale
    assert torch.equal(rounded, inputs.rounded(FORMATS[form].storage.inputs, plain, scale))
    assert not torch.equal(rounded, plain)
    change.finish(student)
    assert all(len(layer._forward_pre_hooks) == (layer is layers[name]) for layer in layers.values())


def distill(student, model, folder, weights, name="run", **settings):
    output = folder / name
    output.mkdir()
    parameters = {**SETTINGS, **settings, "weights": weights}
    return work.distill(str(student), str(model), str(output), str(folder / "scratch"), parameters), output


def test_the_loss_is_that_of_the_rounded_student(model, tmp_path):
    """INT4 rounding costs an unpruned student something, and training with it wins some of it back."""
    weights = {"rounded": {"format": "int4_rtn", "group_size": 32}}
    metrics, output = distill(model, model, tmp_path, weights, tokens=20 * 4 * 32, learning_rate=3e-4)
    assert metrics["heldout_loss_before"] > 0.001, "the student is its teacher, but for the rounding"
    assert metrics["heldout_loss_after"] < 0.9 * metrics["heldout_loss_before"]
    weight = model_files.load(output, torch.float32)[0].model.layers[0].mlp.up_proj.weight
    assert len(weight[0, :32].unique()) > 16, "what is saved is not rounded yet"


def test_zeros_stay_in_a_rounded_student(model, calibration, tmp_path):
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    parameters = {"method": "magnitude", "sparsity": 0.5}
    prune(str(model), str(calibration), str(sparse), str(tmp_path / "pruning"), parameters)
    weights = {"keep_zeros": True, "rounded": {"format": "int4_rtn", "group_size": 32}}
    _, output = distill(sparse, model, tmp_path, weights)
    before, after = (model_files.load(folder, torch.float32)[0] for folder in (sparse, output))
    for old, new in zip(observe.linears(before).values(), observe.linears(after).values(), strict=True):
        assert (new.weight[old.weight == 0] == 0).all() and not torch.equal(old.weight, new.weight)


def test_a_format_that_cannot_store_a_layer(model, tmp_path, monkeypatch):
    row = FORMATS["nvfp4"]
    monkeypatch.setitem(FORMATS, "nvfp4", replace(row, storage=replace(row.storage, block=48)))
    with pytest.raises(Failure, match="do not divide the .* of model.layers.0") as caught:
        distill(model, model, tmp_path, {"rounded": {"format": "nvfp4"}})
    assert caught.value.failure_class == "unsupported"
