"""Depth pruning: which blocks go, and a smaller ordinary checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trimtab.components.pruning import depth
from trimtab.components.pruning.work import prune
from trimtab.errors import Failure
from trimtab.model import inspect


@pytest.mark.parametrize(
    ("influence", "count", "removed"),
    [
        ([0.9, 0.1, 0.2, 0.8], 1, [1]),
        ([0.9, 0.1, 0.2, 0.8], 2, [1, 2]),
        ([0.9, 0.3, 0.2, 0.1], 3, [1, 2, 3]),
        ([0.5, 0.5, 0.5, 0.5], 2, [0, 1]),  # the first among equals
        ([-0.1, 0.5, 0.2, 0.1], 1, [0]),  # opposite directions give an influence above 1, the same below 0
    ],
)
def test_the_least_influential_blocks(influence, count, removed):
    assert depth.least_influential(torch.tensor(influence), count) == removed


@pytest.mark.parametrize(
    ("influence", "count", "removed"),
    [
        ([0.1, 0.9, 0.2, 0.3], 1, [0]),
        ([0.1, 0.9, 0.2, 0.3], 2, [2, 3]),  # the two weakest, 0 and 2, do not follow one another
        ([0.1, 0.2, 0.2, 0.1], 3, [0, 1, 2]),  # the first among equals
        ([0.1, 0.2, 0.2, 0.1], 4, [0, 1, 2, 3]),
    ],
)
def test_the_least_influential_run(influence, count, removed):
    assert depth.least_influential_run(torch.tensor(influence), count) == removed


def test_depth_pruning_leaves_an_ordinary_checkpoint(model, calibration, tmp_path):
    metrics = prune(str(model), str(calibration), str(tmp_path), "", {"method": "depth", "blocks": 1})
    assert metrics["blocks"] == 3 and inspect(tmp_path).layers == 3
    influence = load_file(calibration / "statistics.safetensors")["block_influence"]
    gone = int(influence.argmin())
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    kept = [n for n in range(4) if n != gone]
    for place, origin in enumerate(kept):
        name = "self_attn.q_proj.weight"
        assert torch.equal(after[f"model.layers.{place}.{name}"], before[f"model.layers.{origin}.{name}"])


@pytest.mark.parametrize(
    "parameters",
    [
        {"method": "depth", "blocks": 2},
        {"method": "depth", "blocks": 2, "contiguous": True},
        {"method": "magnitude", "sparsity": 0.5},
    ],
)
def test_what_is_left_generates(parameters, model, calibration, tmp_path):
    metrics = prune(str(model), str(calibration), str(tmp_path), str(tmp_path / "scratch"), parameters)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    cached = reloaded.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    plain = reloaded.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain), "the blocks' places in the KV cache are right"
    assert metrics["zeros"] == pytest.approx(0.5 if parameters["method"] == "magnitude" else 0, abs=0.001)


def test_no_more_blocks_than_there_are(model, calibration, tmp_path):
    with pytest.raises(Failure, match="4 of 4 blocks cannot be removed; write at most 3") as caught:
        prune(str(model), str(calibration), str(tmp_path), "", {"method": "depth", "blocks": 4})
    assert caught.value.failure_class == "unsupported" and list(tmp_path.iterdir()) == []
