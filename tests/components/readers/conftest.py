"""Exports of tiny models of several families, for readers that are not trimtab's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import decoders
import pytest


class Exported(NamedTuple):
    """An export, the checkpoint that it was made of, and what was measured of that."""

    folder: Path
    source: Path
    calibration: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A function: model type, format, KV cache -> its export, made once a session; not to be changed."""
    from trimtab.components.calibration.work import calibrate
    from trimtab.components.quantization.work import quantize

    made: dict[str, Exported] = {}
    measured: dict[str, tuple[Path, Path]] = {}

    def make(model_type: str, form: str, kv_cache: str = "none") -> Exported:
        if model_type not in measured:
            folder = tmp_path_factory.mktemp(model_type)
            (folder / "calibration").mkdir()
            source = decoders.write(folder / "source", model_type)
            calibrate(str(source), str(folder / "calibration"), "", {"samples": 4, "length": 32})
            measured[model_type] = source, folder / "calibration"
        key = f"{model_type}-{form}-{kv_cache}"
        if key not in made:
            source, calibration = measured[model_type]
            folder, scratch = tmp_path_factory.mktemp(key), tmp_path_factory.mktemp("scratch")
            settings = {"format": form, "group_size": 32, "kv_cache": kv_cache}
            quantize(str(source), str(calibration), None, None, str(folder), str(scratch), settings)
            made[key] = Exported(folder, source, calibration)
        return made[key]

    return make
