"""Tiny models on disk, and their exports: what the stages' work is tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model", layers=4)


@pytest.fixture(scope="session")
def calibration(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trimtab.components.calibration.work import calibrate

    folder = tmp_path_factory.mktemp("calibration")
    calibrate(str(model), str(folder), "", {"samples": 4, "length": 32})
    return folder


@pytest.fixture(scope="session")
def harms(model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sensitivity tree: the harm of each format to each group of layers."""
    from trimtab.components.quantization.mixed import sensitivity

    folder = tmp_path_factory.mktemp("sensitivity")
    formats = ["int4_gptq", "int8_wo", "int4_rtn", "nvfp4_wo", "nvfp4", "fp8", "fp8_gptq"]
    parameters = {"formats": formats, "group_size": 32}
    sensitivity.measure(str(model), str(calibration), str(folder), "", parameters)
    return folder


@pytest.fixture(scope="session")
def export(
    model: Path, calibration: Path, harms: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function: format -> the export of the tiny model, made once a session; not to be changed."""
    from trimtab.components.quantization import work

    made: dict[str, Path] = {}

    def make(name: str, **settings) -> Path:
        key = f"{name} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            scratch = tmp_path_factory.mktemp("scratch")
            trees = (str(tree) for tree in (model, calibration, harms))
            work.quantize(*trees, str(made[key]), str(scratch), {"format": name, "group_size": 32, **settings})
        return made[key]

    return make
