"""A grown model computes what the small one does, in another shape."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tiny
import torch

from trimtab.runtime.checkpoint import model_files

#: Larger in every size, with more heads to a key, wider heads and two blocks more.
SHAPE = {"hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_dim": 32}  # fmt: skip


@pytest.fixture
def grown_model(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("grown_model")


@torch.inference_mode()
def test_it_computes_nearly_the_same(grown_model, tmp_path):
    source = tiny.write_model(tmp_path / "small", layers=2)  # 64 channels, 4 heads of 16 in 2 groups
    count = grown_model.grow(source, tmp_path / "large", SHAPE, noise=1e-3)
    small, large = (model_files.load(folder, torch.float32)[0] for folder in (source, tmp_path / "large"))
    assert count == sum(parameter.numel() for parameter in large.parameters())
    assert large.config.num_hidden_layers == 4 and large.model.layers[3].self_attn.q_proj.weight.shape == (288, 144)
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    one, other = (model(tokens).logits.log_softmax(-1) for model in (small, large))
    assert (one - other).abs().max() < 0.05 * one.std()
