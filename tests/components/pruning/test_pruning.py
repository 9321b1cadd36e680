"""Depth pruning: which blocks go, and a smaller ordinary checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trimtab.base.errors import Failure, InputError
from trimtab.components.pruning import work
from trimtab.components.pruning.structured import depth, writing
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint import stream


def prune(model, calibration, folder, **parameters):
    folder.mkdir(exist_ok=True)
    return work.prune(str(model), str(calibration), str(folder), f"{folder}-scratch", parameters)


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
    metrics = prune(model, calibration, tmp_path, method="depth", blocks=1)
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
    metrics = prune(model, calibration, tmp_path, **parameters)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    cached = reloaded.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    plain = reloaded.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain), "the blocks' places in the KV cache are right"
    assert metrics["zeros"] == pytest.approx(0.5 if parameters["method"] == "magnitude" else 0, abs=0.001)


def test_no_more_blocks_than_there_are(model, calibration, tmp_path):
    with pytest.raises(Failure, match="4 of 4 blocks cannot be removed; write at most 3") as caught:
        prune(model, calibration, tmp_path, method="depth", blocks=4)
    assert caught.value.failure_class == "unsupported" and list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


@pytest.mark.parametrize("parameters", [{"method": "depth", "blocks": 1}, {"method": "width", "ffn": 0.5}])
def test_a_kill_costs_the_open_shard(parameters, model, calibration, tmp_path, monkeypatch):
    """Four blocks, a shard each, and what stands outside of them; two blocks are finished when it is killed."""
    prune(model, calibration, tmp_path / "whole", **parameters)
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    check, seen = writing.check_finite, []

    def counted(name, tensor):
        seen.append(name)
        if killed and len({n.split(".")[2] for n in seen if ".layers." in n}) == 3:
            raise Killed
        check(name, tensor)

    monkeypatch.setattr(writing, "check_finite", counted)
    killed = True
    with pytest.raises(Killed):
        prune(model, calibration, tmp_path / "resumed", **parameters)
    assert list((tmp_path / "resumed").iterdir()) == [], "nothing half-written is visible"
    killed, before, seen[:] = False, set(seen[:-1]), []
    prune(model, calibration, tmp_path / "resumed", **parameters)
    assert not before & set(seen), "finished shards are not made again"
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = {n: t for path in (tmp_path / "resumed").glob("*.safetensors") for n, t in load_file(path).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def test_tensors_keep_their_type(model, calibration, tmp_path):
    before = load_file(model / "model.safetensors")
    prune(model, calibration, tmp_path, method="width", ffn=0.5)
    after = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}


@pytest.mark.parametrize("parameters", [{"method": "depth", "blocks": 1}, {"method": "width", "ffn": 0.5}])
def test_weights_that_are_not_finite_are_refused(parameters, model, calibration, tmp_path, monkeypatch):
    def broken(checkpoint):
        export = Export(checkpoint)
        view = export.view
        export.view = lambda name: view(name) * torch.nan if name == "model.norm.weight" else view(name)
        return export

    Export = writing.Export
    monkeypatch.setattr(writing, "Export", broken)
    with pytest.raises(InputError, match="model.norm.weight holds NaN or infinity"):
        prune(model, calibration, tmp_path, **parameters)
