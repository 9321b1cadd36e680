"""Exports of tiny models of several families, for readers that are not trimtab's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import decoders
import pytest

from trimtab.catalog.formats import FORMATS


class Exported(NamedTuple):
    """An export, the checkpoint that it was made of, and what was measured of that."""

    folder: Path
    source: Path
    calibration: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A function: model type, format, KV cache, changes of `decoders` -> its export, made once; not to be changed."""
    from trimtab.components.calibration.work import calibrate
    from trimtab.components.quantization.mixed import sensitivity
    from trimtab.components.quantization.work import quantize

    made: dict[str, Exported] = {}
    measured: dict[str, tuple[Path, Path]] = {}

    def harms(model: str, parts: tuple[str, ...]) -> str:
        """The tree with the harm of each format that a mix is made of."""
        source, calibration = measured[model]
        folder = tmp_path_factory.mktemp("sensitivity")
        parameters = {"formats": list(parts), "group_size": 32}
        sensitivity.measure(str(source), str(calibration), str(folder), "", parameters)
        return str(folder)

    def make(model_type: str, form: str, kv_cache: str = "none", **changes: int) -> Exported:
        if "layer_types" not in decoders._OWN.get(model_type, {}) and model_type != "nemotron_h":
            changes = {"num_hidden_layers": 2} | changes
        model = f"{model_type} {changes}"
        if model not in measured:
            folder = tmp_path_factory.mktemp(model_type)
            (folder / "calibration").mkdir()
            source = decoders.write(folder / "source", model_type, **changes)
            calibrate(str(source), str(folder / "calibration"), "", {"samples": 2, "length": 32})
            measured[model] = source, folder / "calibration"
        key = f"{model} {form} {kv_cache}"
        if key not in made:
            source, calibration = measured[model]
            folder, scratch = tmp_path_factory.mktemp(form), tmp_path_factory.mktemp("scratch")
            settings, parts = {"format": form, "group_size": 32, "kv_cache": kv_cache}, FORMATS[form].mixes
            trees = [str(source), str(calibration), harms(model, parts) if parts else None]
            quantize(*trees, str(folder), str(scratch), settings | ({"effective_bits": 6} if parts else {}))
            made[key] = Exported(folder, source, calibration)
        return made[key]

    return make
