"""A student of two blocks of the tiny model's four, and a way to distil it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trimtab.components.distillation import work
from trimtab.components.pruning.work import prune
from trimtab.recipe import Distillation

#: Six steps.
SETTINGS = {"tokens": 6 * 4 * 32, "batch_size": 4, "length": 32, "learning_rate": 0.001}


@pytest.fixture(scope="session")
def student(model, calibration, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    prune(str(model), str(calibration), str(folder), str(folder / "scratch"), {"method": "depth", "blocks": 2})
    return folder


@pytest.fixture
def distill(student, model, tmp_path):
    """A function: distils with some settings and returns the metrics, the weights and distillation.json."""

    def run(name="run", pair=(student, model), trees=(None, None), files=None, **settings):
        output = tmp_path / f"{name}-output"
        output.mkdir()
        parameters = Distillation(**SETTINGS | settings).model_dump(mode="json") | ({"files": files} if files else {})
        first, second = map(str, pair)
        metrics = work.distill(first, second, str(output), str(tmp_path / "scratch"), parameters, *trees)
        return metrics, load_file(output / "model.safetensors"), json.loads((output / "distillation.json").read_text())

    return run
