"""Whole stages on tiny models of the families whose blocks differ: measured, pruned, quantized, checked, distilled."""

from __future__ import annotations

from pathlib import Path

import decoders
import measured as measured_of
import pytest
import torch

from trimtab import families
from trimtab.components.distillation.objective.loss import distillation_loss
from trimtab.components.distillation.objective.objective import Objective
from trimtab.components.pruning.work import prune
from trimtab.components.quantization import work
from trimtab.components.validation.integrity import gate
from trimtab.families.fusion import groups
from trimtab.model.facts import inspect
from trimtab.recipe import Distillation
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.checkpoint.model_files import Export

#: One of each build: what stands where, which layers are one, what becomes of logits.
BUILDS = ("granite", "cohere", "cohere2", "gemma2", "vaultgemma", "nanochat", "hyperclovax", "apertus", "ministral3",
          "jais2", "nemotron", "bloom", "mpt", "gpt_bigcode", "gptj", "codegen", "persimmon",
          "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text")  # fmt: skip
#: Format -> relative error of a layer at most, as in quantization/conftest.py; but behind relu² SmoothQuant has neurons
#: that 128 tokens hardly excite, and gives their weights few steps.
FORMATS = {"int8_sq": 0.3, "fp8": 0.05, "int4_awq": 0.3, "int4_gptq": 0.3}


@pytest.fixture(scope="module", params=BUILDS)
def measured(request, tmp_path_factory) -> tuple[str, Path, dict[str, str]]:
    """A family, its model and all that is measured of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = decoders.write(folder / "source", request.param)
    return request.param, source, measured_of.trees(source, folder, samples=16, length=64)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_passes_the_gate_and_is_near_its_source(form, measured, tmp_path) -> None:
    model_type, source, made = measured
    export, report = tmp_path / "export", tmp_path / "report"
    export.mkdir()
    report.mkdir()
    parameters = {"format": form, "group_size": 32}
    work.quantize(str(source), made["calibration"], None, str(export), str(tmp_path / "s"), parameters)
    told = gate.inspect(str(export), str(source), str(report), "", parameters)
    assert told["reload_skipped"] == "" and told["quantized_share"] < 0.7
    read, plain = Export(export), Export(source)
    family = families.named(model_type)
    assert set(read.layers) == {layer.name for layer in inspect(source).linears if not family.keeps(layer.name)}
    for group in groups(read.layers, model_type):
        norm = f"{group.norm}.weight"
        both = [part.tensor(norm).float() + family.norm_offset if group.norm else 1.0 for part in (read, plain)]
        change = both[0] / both[1]
        for layer in group.layers:
            weight = plain.tensor(f"{layer}.weight").float()
            assert (dequantize(read.layer(layer)) * change - weight).norm() < FORMATS[form] * weight.norm(), layer


@pytest.mark.parametrize(
    "settings",
    [{"method": "depth", "blocks": 1}, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "wanda", "sparsity": 0.5}],
    ids=["depth", "sparsegpt", "wanda"],
)
def test_a_pruned_model_is_a_whole_one(settings, measured, tmp_path) -> None:
    _, source, made = measured
    (tmp_path / "pruned").mkdir()
    told = prune(str(source), made["calibration"], str(tmp_path / "pruned"), str(tmp_path / "s"), settings)
    assert told["blocks"] == decoders.LAYERS - settings.get("blocks", 0)
    assert settings["method"] == "depth" or told["zeros"] == pytest.approx(0.5, abs=0.01)
    model, _ = model_files.load(tmp_path / "pruned", torch.float32)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_the_distillation_loss_is_that_of_transformers_logits(measured, tmp_path) -> None:
    """And so is its gradient, though both are computed from hidden states, a chunk at a time."""
    model_type, source, _ = measured
    folders = (decoders.write(tmp_path, model_type, seed=1), source)
    student, teacher = (model_files.load(folder, torch.float32)[0] for folder in folders)
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    settings = Distillation(tokens=1000, length=24, temperature=2.0, label_weight=0.25)
    logits = [model(tokens).logits[:, :-1].flatten(0, 1) for model in (student, teacher)]
    labels = tokens[:, 1:].flatten()
    expected = distillation_loss(logits[0], logits[1].detach(), labels, 2.0, 0.25, settings.loss) / len(labels)
    weight = next(p for name, p in student.named_parameters() if name.endswith(("down_proj.weight", "fc2.weight",
                  "fc_out.weight", "4h_to_h.weight", "mlp.c_proj.weight", ".w2.weight")))  # fmt: skip
    found = Objective(student, teacher, settings)(tokens, torch.arange(2))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    right, gradient = (torch.autograd.grad(loss, weight)[0] for loss in (expected, found))
    assert (gradient - right).norm() < 1e-3 * right.norm()
