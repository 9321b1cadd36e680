"""What tests of the integrity gate share: the gate itself, and exports that were changed behind it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.validation.integrity.gate import inspect
from trimtab.recipe import Quantization

#: Format -> what else its recipe asks for.
SETTINGS = dict.fromkeys(FORMATS, {}) | {
    "fp8": {"kv_cache": "fp8"},
    "int4_awq": {"exclude": ["lm_head", "*.k_proj"]},
    "int4_gptq": {"exclude_sensitive": 2},
    "nvfp4": {"kv_cache": "nvfp4"},
    "nvfp4_wo": {"exclude": ["lm_head", "*.v_proj", "*.up_proj"]},
    "mixed_gpu": {"effective_bits": 6},
    "mixed_fp4": {"effective_bits": 6, "max_time": 0.6, "step_tokens": 1000},
    "mixed": {"effective_bits": 5.5},
    "bf16": {"kv_cache": "int8"},
}
LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def check(
    export: Path, model: Path, folder: Path, name: str, calibration: Path | None = None, **settings
) -> dict[str, Any]:
    output = folder / "output"
    output.mkdir()
    parameters = {"format": name, "group_size": 32, **settings}
    weighed = str(calibration) if calibration and Quantization.model_validate(parameters).needs_statistics else None
    return inspect(str(export), str(model), str(output), "", parameters, weighed)


@pytest.fixture
def damaged(export: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function: format and fault -> a copy of its export, its tensors changed by the fault."""

    def damage(name: str, fault: Callable[[Tensors], None], **settings) -> Path:
        folder = shutil.copytree(export(name, **settings), tmp_path / "damaged")
        path = folder / "model.safetensors"
        tensors = load_file(path)
        fault(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return damage


def damage_of(reason: str, folder: Path, model: Path, tmp_path: Path, name: str, **settings) -> None:
    with pytest.raises(Failure, match=reason) as caught:
        check(folder, model, tmp_path, name, **settings)
    assert caught.value.failure_class == "export_damaged"
