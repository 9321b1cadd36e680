"""An export in float16 is judged in float16's range, whatever the engine computes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.components.quantization.work import quantize
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import config_file
from trimtab.runtime.engines.torch_engine import TorchEngine

UP, DOWN = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))
WINDOWS = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of two blocks, in bfloat16, whose neurons carry 2 ** 18 times as much: its function is the same."""
    folder = tiny.write_model(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP], tensors[DOWN] = tensors[UP] * 2**17, tensors[DOWN] / 2**17
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def exported(model: Path, form: str, folder: Path) -> Path:
    folder.mkdir()
    quantize(str(model), None, None, str(folder), str(folder / "scratch"), {"format": form})
    return folder


def engine(folder: Path) -> TorchEngine:
    return TorchEngine(folder, Engine(max_seq_len=64), device="cpu")


def test_an_export_that_fits_float16_is_judged_as_ever(tmp_path):
    model = tiny.write_model(tmp_path / "model")
    half, plain = exported(model, "fp16", tmp_path / "fp16"), exported(model, "bf16", tmp_path / "bf16")
    assert config_file.declared_dtype(half) == torch.float16
    assert engine(half).nll(WINDOWS) == pytest.approx(engine(plain).nll(WINDOWS), rel=1e-3)


def test_activations_that_overflow_in_float16_are_found(large, tmp_path):
    half = exported(large, "fp16", tmp_path / "fp16")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(half / "model.safetensors").values())
    judged = engine(half)
    with pytest.raises(Failure, match=r"layers\.1\.mlp\..*reaches .* in float16, which ends at 65,504") as caught:
        judged.nll(WINDOWS)
    assert caught.value.failure_class == "unsupported"
    with pytest.raises(Failure, match="float16"):
        judged.loglikelihood([([3, 4], [5, 6])])


def test_the_same_in_bfloat16_is_no_overflow(large, tmp_path):
    assert all(value > 0 for value in engine(exported(large, "bf16", tmp_path / "bf16")).nll(WINDOWS))


def test_a_model_in_float16_is_told_what_to_write(large):
    path = large / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(Failure, match='"dtype": "bfloat16" in its config.json'):
        engine(large).nll(WINDOWS)
    path.write_text(json.dumps(config | {"dtype": "bfloat16"}))
    engine(large).nll(WINDOWS)


def test_a_weight_that_float16_has_no_number_for_is_refused(large, tmp_path):
    tensors = load_file(large / "model.safetensors")
    tensors[UP][0, 0] = 1e5
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=f"{UP}: holds 99,840, and float16 ends at 65,504; write format: bf16"):
        exported(large, "fp16", tmp_path / "fp16")
