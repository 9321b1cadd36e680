"""State-space layers read a batch in parts and in short chunks, which hold less and compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import decoders
import pytest
import torch
from transformers import PreTrainedModel

from trimtab.runtime.checkpoint import model_files, scans

TYPES = ("mamba", "falcon_mamba", "jamba", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h")
ROWS, LENGTH = 5, 70


def layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "ssm_state_size")]


@pytest.fixture(params=TYPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose config asks for long chunks, as published ones do."""
    made = decoders.write(tmp_path, request.param)
    config = json.loads((made / "config.json").read_text())
    config |= {name: 128 for name in ("chunk_size", "mamba_chunk_size") if name in config}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("at_once", [1, 2])
@torch.inference_mode()
def test_parts_compute_what_one_chunk_of_all_does(at_once: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "bound", lambda model: None)
    whole, _ = model_files.load(folder, torch.float32)
    monkeypatch.undo()
    parts, _ = model_files.load(folder, torch.float32)
    layer = layers(parts)[0]
    monkeypatch.setitem(scans.ROOM, "cpu", at_once * 4 * 96 * layer.intermediate_size * layer.ssm_state_size)
    read: list[int] = []
    for each in layers(parts):
        each.out_proj.register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    tokens = torch.randint(3, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens)
    seen[1, :9] = seen[4, :20] = 0
    for given, sizes in (({}, {1} if at_once == 1 else {1, 2}), ({"attention_mask": seen}, {2, 3})):
        read.clear()
        found, expected = (model(tokens, use_cache=False, **given).logits for model in (parts, whole))
        if given:
            found, expected = found[seen.bool()], expected[seen.bool()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert set(read) == sizes


def test_chunks_are_short(folder: Path) -> None:
    model, _ = model_files.load(folder, torch.float32)
    sizes = {layer.chunk_size for layer in layers(model) if hasattr(layer, "chunk_size")}
    assert sizes == ({scans.CHUNK} if "chunk_size" in (folder / "config.json").read_text() else set())
