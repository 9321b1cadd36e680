"""The integrity gate loads an export and reads what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.components.validation.evaluation.generation import is_degenerate
from trimtab.components.validation.integrity import reload
from trimtab.components.validation.integrity.gate import inspect
from trimtab.runtime.engines import kept


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes."""
    folder = tiny.write_model(tmp_path_factory.mktemp("talker") / "model", layers=1)
    assert reload.check(folder, folder)["skipped"] is None
    return folder


def counting(folder: Path) -> Path:
    """A model that writes the next token of its vocabulary behind each: no repetition, and no tie for sums to break."""
    tiny.write_model(folder, layers=1, family="mistral")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def silenced(talker: Path, folder: Path, **changes: float) -> Path:
    """A copy whose blocks do nothing, so that each token's embedding is likest to itself."""
    copy = shutil.copytree(talker, folder / "silenced")
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name, value in changes.items():
        tensors[name].fill_(value)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_text_that_became_a_repetition(tmp_path):
    source = counting(tmp_path / "source")
    with pytest.raises(Failure, match="all that it writes is empty or a repetition, after 'The capital") as caught:
        reload.check(silenced(source, tmp_path), source)
    assert caught.value.failure_class == "export_damaged"


def test_a_kv_cache_that_ruins_the_text_is_left_to_the_evaluation(talker, tmp_path):
    folder = tiny.write_kv_cache(talker, tmp_path / "cached", "FP8", 1e-9, 1e-9)
    outputs = reload.check(folder, talker)["outputs"]
    assert outputs != reload.check(talker, talker)["outputs"]


def test_a_source_whose_own_text_is_a_repetition_acquits(talker, tmp_path):
    folder = silenced(talker, tmp_path)
    outputs = reload.check(folder, folder)["outputs"]
    assert all(is_degenerate(list(text.encode())) for text in outputs.values())


def test_logits_that_are_no_numbers(talker, tmp_path):
    folder = silenced(talker, tmp_path, **{"model.norm.weight": torch.inf})
    with pytest.raises(Failure, match="its logits after 'The capital of France is' are not all finite"):
        reload.check(folder, talker)


def test_what_the_engine_cannot_run_is_said(talker, monkeypatch, tmp_path):
    def unsupported(*_: Any) -> None:
        raise Failure("unsupported", "a head that caps its logits")

    monkeypatch.setattr(kept, "loaded", unsupported)
    folder = shutil.copytree(talker, tmp_path / "copy")
    (tmp_path / "output").mkdir()
    metrics = inspect(str(folder), str(talker), str(tmp_path / "output"), "", {})
    assert metrics["reload_skipped"] == "a head that caps its logits"
    assert json.loads((tmp_path / "output" / "reload.json").read_text())["skipped"] == metrics["reload_skipped"]
