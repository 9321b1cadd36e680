"""An export whose two configs say something else than its tensors, its recipe or each other is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import LAYER, SETTINGS, check, damage_of


def edited(export: Path, folder: Path, own: Callable[[dict], Any], flat: Callable[[dict], Any]) -> Path:
    """A copy of an export with changes to hf_quant_config.json's settings and to those of config.json."""
    copy = shutil.copytree(export, folder / "edited")
    path = copy / "hf_quant_config.json"
    document = json.loads(path.read_text())
    own(document["quantization"])
    path.write_text(json.dumps(document))
    path = copy / "config.json"
    document = json.loads(path.read_text())
    flat(document["quantization_config"])
    path.write_text(json.dumps(document))
    return copy


def same(_: dict) -> None:
    pass


SAYS = "hf_quant_config.json says .*, config.json says"
DISAGREE = {
    "quant_algo": ("int8_wo", same, lambda c: c.update(quant_algo="FP8"), f"quant_algo: {SAYS} 'FP8'"),
    "group size": (
        "nvfp4", same, lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32),
        f"group_size: {SAYS} 32",
    ),
    "excluded": ("int8_wo", lambda c: c.update(exclude_modules=[]), same, "the excluded modules: "),
    "KV cache": ("fp8", same, lambda c: c.pop("kv_cache_scheme"), f"the KV cache: {SAYS} None"),
    "KV cache by name": (
        "nvfp4", same, lambda c: c.update(kv_cache_scheme={"type": "float", "num_bits": 8}), "the KV cache: ",
    ),
    "a layer": (
        "mixed", lambda c: c["quantized_layers"].pop(LAYER), same, f"{re.escape(LAYER)}: {SAYS}",
    ),
    "method": ("fp8", same, lambda c: c.update(quant_method="gptq"), "quant_method is 'gptq', not 'modelopt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREE)
def test_two_configs_that_disagree(case, export, model, tmp_path):
    name, own, flat, reason = DISAGREE[case]
    folder = edited(export(name, **SETTINGS[name]), tmp_path, own, flat)
    damage_of(reason, folder, model, tmp_path, name, **SETTINGS[name])


def test_a_wrong_group_size_in_the_config(export, model, tmp_path):
    folder = edited(export("int4_rtn"), tmp_path, lambda c: c.update(group_size=64), same)
    reason = r"model\.layers\.0\.mlp\.down_proj: has groups of 64, the recipe asks for 32"
    damage_of(reason, folder, model, tmp_path, "int4_rtn")


def test_a_lost_kv_cache(export, model, tmp_path):
    def lose(settings: dict) -> None:
        settings.pop("kv_cache_quant_algo", None)
        settings.pop("kv_cache_scheme", None)

    folder = edited(export("fp8", **SETTINGS["fp8"]), tmp_path, lose, lose)
    reason = r"model\.layers\.0\.self_attn \(4 layers in all\): the export says 16 bits of its KV cache"
    damage_of(reason, folder, model, tmp_path, "fp8", **SETTINGS["fp8"])


@pytest.mark.parametrize("lost", ["hf_quant_config.json", "config.json"])
def test_a_config_that_says_nothing(lost, export, model, tmp_path):
    folder = shutil.copytree(export("fp8"), tmp_path / "edited")
    if lost == "config.json":
        config = json.loads((folder / lost).read_text())
        del config["quantization_config"]
        (folder / lost).write_text(json.dumps(config))
    else:
        (folder / lost).unlink()
    damage_of(f"{lost} says nothing of the quantization", folder, model, tmp_path, "fp8")


def test_a_config_of_another_model(export, model, tmp_path):
    folder = shutil.copytree(export("fp8"), tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    damage_of("config.json: rms_norm_eps is 0.1, its source's", folder, model, tmp_path, "fp8")


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 5.0), ("rope_parameters", {"rope_theta": 5.0})])
def test_a_setting_that_only_some_engines_read(key, value, export, model, tmp_path):
    """Each spelling is the source's: transformers 5 reads one of the two, TensorRT-LLM may read the other."""
    folder = shutil.copytree(export("fp8"), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    damage_of(f"config.json: {key} is .*5.0.*, its source's", folder, model, tmp_path, "fp8")


def test_an_export_in_one_spelling_alone_passes(export, model, tmp_path):
    """As ModelOpt writes it."""
    folder = shutil.copytree(export("fp8"), tmp_path / "alone")
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert len(kept) == len(config) - 3
    (folder / "config.json").write_text(json.dumps(kept))
    check(folder, model, tmp_path, "fp8")
