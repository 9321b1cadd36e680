"""A clean export passes; an export with one seeded fault is refused, and the layer is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trimtab.components.validation.integrity import inspect
from trimtab.errors import Failure

SETTINGS = {
    "int8_wo": {},
    "int8_sq": {},
    "fp8": {},
    "fp8_per_channel": {},
    "int4_rtn": {},
    "int4_awq": {},
    "int4_gptq": {},
    "w4a8_awq": {},
    "nvfp4": {},
    "mxfp4": {},
    "mixed": {"effective_bits": 5.5},
}
LAYER = "model.layers.1.mlp.down_proj"


def check(export: Path, model: Path, folder: Path, name: str, **settings) -> dict[str, float]:
    output = folder / "output"
    output.mkdir()
    parameters = {"format": name, "group_size": 32, **settings}
    return inspect(str(export), str(model), str(output), "", parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_clean(name, export, model, tmp_path):
    metrics = check(export(name, **SETTINGS[name]), model, tmp_path, name, **SETTINGS[name])
    assert metrics["quantized_share"] < (0.35 if name.startswith("int4") else 0.58)
    assert 0 < metrics["max_relative_error"] < 0.3
    layers = json.loads((tmp_path / "output" / "layers.json").read_text())
    assert len(layers) == 4 * 7 and all(layer["cosine"] > 0.95 for layer in layers)


def test_a_model_that_is_not_quantized(model, tmp_path):
    (tmp_path / "output").mkdir()
    metrics = inspect(str(model), str(model), str(tmp_path / "output"), "", {})
    assert metrics["quantized_share"] == 1 and metrics["bytes"] > 0


def scaled_ten_times(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"] * 10


def one_wrong_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"][5] *= 3


def swapped_scales(tensors: dict[str, torch.Tensor]) -> None:
    other = LAYER.replace("down_proj", "up_proj")
    for name in (LAYER, other):
        assert f"{name}.weight_scale" in tensors
    rows = min(len(tensors[f"{LAYER}.weight_scale"]), 8)
    scale = tensors[f"{LAYER}.weight_scale"]
    scale[:rows] = scale[:rows].flip(0) * torch.linspace(0.2, 5, rows).reshape(-1, *[1] * (scale.dim() - 1))


def missing_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def missing_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.weight"]


def zeroed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = torch.zeros_like(tensors[f"{LAYER}.weight"])


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"][0] = torch.nan


def another_layer(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("weight", "weight_scale"):
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER.replace('.1.', '.2.')}.{part}"].clone()


FAULTS = [
    scaled_ten_times, one_wrong_scale, swapped_scales, missing_scale,
    missing_weight, zeroed, not_a_number, another_layer,
]  # fmt: skip


@pytest.fixture
def damaged(export: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def damage(name: str, fault: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = shutil.copytree(export(name), tmp_path / "damaged")
        path = folder / "model.safetensors"
        tensors = load_file(path)
        fault(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return damage


@pytest.mark.parametrize("name", ["int8_wo", "int4_rtn"])
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_seeded_faults(fault, name, damaged, model, tmp_path):
    with pytest.raises(Failure, match=LAYER.replace(".", r"\.")) as caught:
        check(damaged(name, fault), model, tmp_path, name)
    assert caught.value.failure_class == "export_damaged"


def test_a_layer_that_was_left_unquantized(export, model, tmp_path):
    folder = export("int8_wo", exclude=["lm_head", "*.down_proj"])
    left = r"model\.layers\.0\.mlp\.down_proj is not quantized \(4 layers in all\)"
    with pytest.raises(Failure, match=left) as caught:
        check(folder, model, tmp_path, "int8_wo")
    assert caught.value.failure_class == "export_damaged"


def test_more_bits_than_the_recipe_asks_for(export, model, tmp_path):
    with pytest.raises(Failure, match=r"quantized weights take 8\.\d bits each, int4_rtn allows") as caught:
        check(export("int8_wo"), model, tmp_path, "int4_rtn")
    assert caught.value.failure_class == "export_damaged"


# --- the KV cache ---------------------------------------------------------------------------------------------

ATTENTION = "model.layers.2.self_attn"
K_SCALE, V_SCALE = f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"
ALGORITHMS = {"fp8": "FP8", "int8": "INT8", "nvfp4": "NVFP4"}


@pytest.fixture
def cached(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function: recipe's KV cache -> the model in 16 bits with that KV cache, its tensors changed by `fault`."""

    def make(kv_cache: str, fault: Callable[[dict[str, torch.Tensor]], None] = lambda _: None) -> Path:
        folder = tiny.write_kv_cache(model, tmp_path / "cached", ALGORITHMS[kv_cache], 0.02, 0.01)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        fault(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return make


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
def test_another_kv_cache_than_asked_for(asked, found, cached, model, tmp_path):
    folder = model if found == "none" else cached(found)
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
