"""An export whose KV cache is not as asked for, or whose scales are not valid, is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trimtab.base.errors import Failure
from trimtab.components.validation.integrity.gate import inspect

from .conftest import check

ATTENTION = "model.layers.2.self_attn"
K_SCALE, V_SCALE = f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"
ALGORITHMS = {"fp8": "FP8", "int8": "INT8", "nvfp4": "NVFP4"}


@pytest.fixture
def cached(damaged: Callable[..., Path]) -> Callable[..., Path]:
    """A function: recipe's KV cache -> the model in 16 bits with that KV cache, its tensors changed by `fault`."""
    return lambda kv_cache, fault=lambda _: None: damaged("bf16", fault, kv_cache=kv_cache)


def refused(folder: Path, model: Path, tmp_path: Path, asked: str) -> str:
    with pytest.raises(Failure) as caught:
        check(folder, model, tmp_path, "bf16", kv_cache=asked)
    assert caught.value.failure_class == "export_damaged"
    return caught.value.reason


@pytest.mark.parametrize("kv_cache", ALGORITHMS)
def test_a_kv_cache_as_asked_for(kv_cache, cached, model, tmp_path):
    check(cached(kv_cache), model, tmp_path, "bf16", kv_cache=kv_cache)


@pytest.mark.parametrize("asked", ["none", *ALGORITHMS])
@pytest.mark.parametrize("found", ["none", *ALGORITHMS])
def test_another_kv_cache_than_asked_for(asked, found, cached, export, model, tmp_path):
    folder = export("bf16") if found == "none" else cached(found)
    if asked == found:
        check(folder, model, tmp_path, "bf16", kv_cache=asked)
        return
    says = ALGORITHMS.get(found, "16 bits")
    where = "model.layers.0.self_attn (4 layers in all)"
    reason = f"{where}: the export says {says} of its KV cache, the recipe asks for {asked}"
    assert refused(folder, model, tmp_path, asked) == reason


def test_modelopt_leaves_no_calibrated_scale_out(export, model, tmp_path):
    """However small: a tiny model's keys are far below 448, where the scale would be 1."""
    folder = export("fp8", kv_cache="fp8")
    check(folder, model, tmp_path, "fp8", kv_cache="fp8")
    tensors = load_file(folder / "model.safetensors")
    assert 0 < tensors[K_SCALE] < 0.5 and 0 < tensors[V_SCALE] < 0.5


def test_a_kv_cache_of_a_recipe_that_quantizes_nothing(cached, model, tmp_path):
    (tmp_path / "output").mkdir()
    with pytest.raises(Failure, match="the export says FP8 of its KV cache, the recipe asks for none"):
        inspect(str(cached("fp8")), str(model), str(tmp_path / "output"), "", {})


def without_keys(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[K_SCALE]


def without_values(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[V_SCALE]


def without_any(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_scale")]:
        del tensors[name]


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[K_SCALE].fill_(torch.inf)


def not_positive(tensors: dict[str, torch.Tensor]) -> None:
    tensors[V_SCALE].neg_()


def one_a_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[K_SCALE] = torch.ones(2)


KV_FAULTS = {
    without_keys: f"{K_SCALE}: is missing",
    without_values: f"{V_SCALE}: is missing",
    without_any: "model.layers.0.self_attn.k_proj.k_scale: is missing",
    not_finite: f"{K_SCALE}: is inf",
    not_positive: f"{V_SCALE}: is -0.0",
    one_a_head: f"{K_SCALE}: has shape [2]",
}


@pytest.mark.parametrize("kv_cache", ALGORITHMS)
@pytest.mark.parametrize("fault", KV_FAULTS, ids=[fault.__name__ for fault in KV_FAULTS])
def test_seeded_faults_of_the_kv_cache(fault, kv_cache, cached, model, tmp_path):
    assert refused(cached(kv_cache, fault), model, tmp_path, kv_cache).startswith(KV_FAULTS[fault])
