"""A clean export passes the integrity gate."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.catalog.formats import FORMATS
from trimtab.components.validation.evaluation.generation import PROMPTS
from trimtab.components.validation.integrity.gate import inspect

from .conftest import SETTINGS, check


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_clean(name, export, model, calibration, tmp_path):
    metrics = check(export(name, **SETTINGS[name]), model, tmp_path, name, calibration, **SETTINGS[name])
    layers = json.loads((tmp_path / "output" / "layers.json").read_text())
    reloaded = json.loads((tmp_path / "output" / "reload.json").read_text())
    assert reloaded["skipped"] is None and len(reloaded["outputs"]) == len(PROMPTS) and metrics["reload_skipped"] == ""
    assert metrics["tensor_bytes"] == pytest.approx(metrics["predicted_bytes"], rel=0.035)
    if FORMATS[name].is_cast:
        assert not layers and metrics["quantized_share"] == 1
        return
    parts = [FORMATS[part].storage for part in FORMATS[name].mixes or (name,)]
    excluded = len(SETTINGS[name].get("exclude", ())) > 2  # up_proj among them
    assert metrics["quantized_share"] < (0.30 if parts[0].bits == 4 and len(parts) == 1 and not excluded else 0.54)
    assert 0 < metrics["max_relative_error"] < (0.2 if any(part.bits == 4 for part in parts if part) else 0.05)
    assert len(layers) >= 4 * 7 - 8 and all(layer["cosine"] > 0.95 for layer in layers)


def test_a_model_that_is_not_quantized(model, tmp_path):
    (tmp_path / "output").mkdir()
    metrics = inspect(str(model), str(model), str(tmp_path / "output"), "", {})
    assert metrics["quantized_share"] == 1 and metrics["bytes"] > metrics["tensor_bytes"] > 0


def test_a_model_that_stores_more_than_is_read(model, tmp_path):
    """The embedding once more as a tied head, and what transformers computes: neither is damage of a model unchanged,
    and both are left out of its export."""
    from trimtab.components.quantization.work import quantize

    old = shutil.copytree(model, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    (tmp_path / "output").mkdir()
    inspect(str(old), str(old), str(tmp_path / "output"), "", {})
    export = tmp_path / "export"
    export.mkdir()
    quantize(str(old), None, None, str(export), str(tmp_path / "scratch"), {"format": "int8_wo"})
    (tmp_path / "output").rename(tmp_path / "first")
    check(export, old, tmp_path, "int8_wo")
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & {
        *load_file(export / "model.safetensors")
    }


@pytest.mark.parametrize("settings", [{}, {"format": "int8_wo"}], ids=["as it is", "int8_wo"])
def test_a_sparse_model_passes(settings, model, calibration, tmp_path):
    from trimtab.components.pruning.work import prune
    from trimtab.components.quantization.work import quantize

    folders = {name: tmp_path / name for name in ("sparse", "quantized", "output")}
    for folder in folders.values():
        folder.mkdir()
    sparse, quantized, output = map(str, folders.values())
    scratch = str(tmp_path / "scratch")
    prune(str(model), str(calibration), sparse, scratch, {"method": "wanda", "pattern": "2:4"})
    if settings:
        quantize(sparse, str(calibration), None, quantized, scratch, settings)  # as the pipeline has it
    metrics = inspect(quantized if settings else sparse, sparse, output, "", settings)
    assert metrics["reload_skipped"] == "" and (metrics["quantized_share"] == 1) == (not settings)
