"""Whole stages on tiny models with recurrent blocks: measured, pruned, quantized, checked, scored, distilled."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import decoders
import measured as measured_of
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.components.distillation.objective.objective import Objective
from trimtab.components.pruning.work import prune
from trimtab.components.quantization import work
from trimtab.components.validation.integrity import gate
from trimtab.families import named
from trimtab.model.facts import inspect
from trimtab.recipe import Distillation, Engine
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine

#: A gated delta net between attention, that with experts, a short convolution, Mambas between and without attention.
BUILDS = ("qwen3_5_text", "qwen3_next", "lfm2", "nemotron_h", "granitemoehybrid", "mamba")
#: Of 384 numbers: a block that predicts a further token, as `mtp.…` of Qwen3.5 and Nemotron.
MTP = {"mtp.layers.0.self_attn.q_proj.weight": torch.arange(384.0).view(6, 64).bfloat16() / 384}


@pytest.fixture(scope="module", params=BUILDS)
def measured(request, tmp_path_factory) -> tuple[str, Path, dict[str, str]]:
    """A family, its model and all that is measured of it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = decoders.write(folder / "source", request.param)
    if named(request.param).beside:
        path = source / "model.safetensors"
        save_file(load_file(path) | MTP, path, metadata={"format": "pt"})
    return request.param, source, measured_of.trees(source, folder, samples=4, length=32)


def test_what_is_measured_goes_by_block(measured) -> None:
    model_type, source, made = measured
    found = load_file(Path(made["calibration"]) / "statistics.safetensors")
    attention = {named(model_type).place(layer.name)[0] for layer in inspect(source).linears
                 if layer.name.endswith("k_proj")}  # fmt: skip
    assert (found["block_influence"] > 0).all()
    for name in ("key_amax", "value_amax"):
        assert [block for block, amax in enumerate(found[name]) if amax > 0] == sorted(attention)


@pytest.mark.parametrize(("form", "kv_cache"), [("int8_wo", "none"), ("fp8", "fp8"), ("int4_gptq", "none"),
                                                ("int4_awq", "none")])  # fmt: skip
def test_an_export_passes_the_gate_and_is_scored(form, kv_cache, measured, tmp_path) -> None:
    model_type, source, made = measured
    family, facts = named(model_type), inspect(source)
    kv_cache = kv_cache if facts.attention_blocks else "none"
    export, report = tmp_path / "export", tmp_path / "report"
    export.mkdir()
    report.mkdir()
    parameters = {"format": form, "group_size": 32, "kv_cache": kv_cache}
    work.quantize(str(source), made["calibration"], None, str(export), str(tmp_path / "s"), parameters)
    assert gate.inspect(str(export), str(source), str(report), "", parameters)["reload_skipped"] == ""
    read = Export(export)
    assert set(read.layers) == {layer.name for layer in facts.linears if not family.keeps(layer.name)}
    scaled = [name for name in read.names if name.endswith(".k_scale")]
    assert len(scaled) == (facts.attention_blocks if kv_cache == "fp8" else 0)
    if family.beside:
        excluded = json.loads((export / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
        assert any(fnmatchcase("mtp.layers.0.self_attn.q_proj", pattern) for pattern in excluded)
        assert torch.equal(read.tensor(*MTP), *MTP.values())
    settings = Engine(max_seq_len=128, max_num_tokens=256, max_batch_size=4)
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    before, after = (TorchEngine(folder, settings, device="cpu").nll(tokens) for folder in (source, export))
    assert after == pytest.approx(before, rel=0.02 if form == "int8_wo" else 0.1)


@pytest.mark.parametrize(
    "settings",
    [{"method": "depth", "blocks": 1}, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "wanda", "sparsity": 0.5}],
    ids=["depth", "sparsegpt", "wanda"],
)
def test_a_pruned_model_is_a_whole_one(settings, measured, tmp_path) -> None:
    model_type, source, made = measured
    (tmp_path / "pruned").mkdir()
    told = prune(str(source), made["calibration"], str(tmp_path / "pruned"), str(tmp_path / "s"), settings)
    assert told["blocks"] == decoders.LAYERS - settings.get("blocks", 0)
    assert settings["method"] == "depth" or told["zeros"] == pytest.approx(0.5, abs=0.01)
    if named(model_type).beside:
        assert torch.equal(Export(tmp_path / "pruned").tensor(*MTP), *MTP.values())
    model, _ = model_files.load(tmp_path / "pruned", torch.float32)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_a_student_learns(measured) -> None:
    """The loss against its own copy is 0, and its gradient reaches what a recurrence decays by."""
    _, source, _ = measured
    student, teacher = (model_files.load(source, torch.float32)[0] for _ in range(2))
    settings = Distillation(tokens=1000, length=24)
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = Objective(student, teacher, settings)(tokens, torch.arange(2))
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.1)
    Objective(student, teacher, settings)(tokens, torch.arange(2)).backward()
    states = [p.grad for name, p in student.named_parameters() if named(student.config.model_type).is_of_state(name)]
    assert states and all(grad is not None and torch.isfinite(grad).all() for grad in states)
