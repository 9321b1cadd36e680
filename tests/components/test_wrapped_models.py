"""Whole stages on wrappers: their text models are measured, pruned, quantized, trained and scored, all else stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import decoders
import measured as measured_of
import pytest
import torch
import wrappers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from trimtab import families
from trimtab.components.calibration.work import calibrate
from trimtab.components.distillation.work import distill
from trimtab.components.fetch import conversion
from trimtab.components.pruning.work import prune
from trimtab.components.quantization import work
from trimtab.components.validation.integrity import gate
from trimtab.model.facts import inspect
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import config_file, model_files
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine

#: Norms of 1 + w and a tied head; sections of rotary embeddings; the same with experts; delta nets; a head
#: within the text model.
BUILDS = ("gemma3", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "llama4")


@pytest.fixture(scope="module", params=BUILDS)
def measured(request, tmp_path_factory) -> tuple[str, Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp(request.param)
    source = wrappers.write(folder / "source", request.param)
    return request.param, source, measured_of.trees(source, folder, samples=8, length=64)


def beside(model_type: str, export: Export) -> list[str]:
    """The tensors of what stands around the text model."""
    family = families.named(model_type)
    found = [name for name in export.names if family.is_beside(name, {"num_hidden_layers": decoders.LAYERS})]
    assert len(found) > 10
    return found


def unchanged(model_type: str, source: Path, made: Path) -> bool:
    before, after = Export(source), Export(made)
    names = beside(model_type, before)
    return beside(model_type, after) == names and all(torch.equal(before.view(n), after.view(n)) for n in names)


def scores(folder: Path) -> list[float]:
    engine = TorchEngine(folder, Engine(backend="torch", max_seq_len=128), "cpu")
    requests = [([5, 6, 7, *range(20, 60)], [8, 9, 10]), ([11, 12], [13])]
    return [likelihood for likelihood, _ in engine.loglikelihood(requests)]


@pytest.mark.parametrize("form", ["int8_wo", "fp8", "int4_gptq"])
def test_an_export_passes_the_gate_and_its_tower_is_the_source_s(form: str, measured, tmp_path: Path) -> None:
    model_type, source, made = measured
    export, report = tmp_path / "export", tmp_path / "report"
    export.mkdir()
    report.mkdir()
    parameters = {"format": form, "group_size": 32, "kv_cache": "none" if form == "int8_wo" else "fp8"}
    work.quantize(str(source), made["calibration"], None, str(export), str(tmp_path / "s"), parameters)
    told = gate.inspect(str(export), str(source), str(report), "", parameters)
    assert told["reload_skipped"] == ""
    read = Export(export)
    keeps = families.named(model_type).keeps
    assert set(read.layers) == {layer.name for layer in inspect(source).linears if not keeps(layer.name)}
    assert unchanged(model_type, source, export)
    config = json.loads((export / "config.json").read_text())
    towers = {name.removesuffix(".weight") for name in beside(model_type, read)} & set(read.matrices)
    assert towers and towers.isdisjoint(read.layers)
    assert all(any(_matches(name, pattern) for pattern in config["quantization_config"]["ignore"]) for name in towers)
    plain = config_file.both_spellings(json.loads((source / "config.json").read_text()))
    own = ("quantization_config", "dtype", "torch_dtype")
    assert {name: value for name, value in config.items() if name not in own} == plain
    assert (export / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    tolerance = 0.2 if form == "int8_wo" else 1.0
    assert scores(export) == pytest.approx(scores(source), abs=tolerance)


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)


@torch.inference_mode()
def test_scores_are_those_of_the_wrapper_on_text(measured) -> None:
    model_type, source, _ = measured
    reference = wrappers.build(model_type).bfloat16().float()
    expected = []
    for context, continuation in (([5, 6, 7, *range(20, 60)], [8, 9, 10]), ([11, 12], [13])):
        logits = reference(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected.append(sum(float(logits[place, token]) for place, token in zip(places, continuation, strict=True)))
    assert scores(source) == pytest.approx(expected, abs=0.1)  # the engine multiplies in bfloat16


@pytest.mark.parametrize(
    "settings",
    [{"method": "depth", "blocks": 1}, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "wanda", "sparsity": 0.5}],
    ids=["depth", "sparsegpt", "wanda"],
)
def test_a_pruned_model_is_a_whole_one(settings, measured, tmp_path: Path) -> None:
    model_type, source, made = measured
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    told = prune(str(source), made["calibration"], str(pruned), str(tmp_path / "s"), settings)
    assert told["blocks"] == decoders.LAYERS - settings.get("blocks", 0)
    assert unchanged(model_type, source, pruned)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, pruned))
    assert after["text_config"].pop("num_hidden_layers") == told["blocks"]
    assert "num_hidden_layers" not in after
    assert before["vision_config"].items() <= after["vision_config"].items()
    assert inspect(pruned).layers == told["blocks"]
    assert all(value < 0 for value in scores(pruned))


def test_what_goes_by_block_goes_on_in_the_text_config(tmp_path: Path) -> None:
    from trimtab.components.pruning.structured import depth

    source = wrappers.write(tmp_path, "gemma3", text={"layer_types": ["sliding_attention"] * 3 + ["full_attention"]})
    left = depth.without(source, [0, 1])
    written = config_file.changed(source, left.config)
    assert written["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]
    assert written["text_config"]["num_hidden_layers"] == 2
    assert written["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]


def test_a_wrapper_s_text_model_is_distilled(tmp_path: Path) -> None:
    source = wrappers.write(tmp_path / "source", "gemma3")
    for name in ("calibration", "pruned", "distilled"):
        (tmp_path / name).mkdir()
    calibrate(str(source), str(tmp_path / "calibration"), "", {"samples": 4, "length": 32})
    prune(str(source), str(tmp_path / "calibration"), str(tmp_path / "pruned"), str(tmp_path / "s"),
          {"method": "depth", "blocks": 1})  # fmt: skip
    distill(str(tmp_path / "pruned"), str(source), str(tmp_path / "distilled"), str(tmp_path / "t"),
            {"tokens": 256, "length": 32, "batch_size": 2})  # fmt: skip
    assert unchanged("gemma3", source, tmp_path / "distilled")
    loaded, _ = model_files.load(tmp_path / "distilled", torch.float32)
    assert len(loaded.base_model.layers) == decoders.LAYERS - 1


def test_an_early_qwen2_5_vl_is_fetched_with_the_names_and_settings_of_later_ones(tmp_path: Path) -> None:
    """Before transformers 4.52 it had its text model's settings among its own, and no `language_model` in its names."""
    later, early, fetched = wrappers.write(tmp_path / "later", "qwen2_5_vl"), tmp_path / "early", tmp_path / "fetched"
    shutil.copytree(later, early)
    fetched.mkdir()
    config = json.loads((later / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"]
    (early / "config.json").write_text(json.dumps({**text, **config}))
    tensors = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in load_file(later / "model.safetensors").items()
    }
    save_file(tensors, early / "model.safetensors", metadata={"format": "pt"})
    conversion.convert(str(early), str(fetched))
    assert inspect(fetched) == inspect(early) == inspect(later)
    assert "hidden_size" not in json.loads((fetched / "config.json").read_text())
    assert scores(fetched) == scores(later)
    reference = wrappers.build("qwen2_5_vl").bfloat16()
    read = AutoModelForImageTextToText.from_pretrained(fetched, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in reference.state_dict().items())
