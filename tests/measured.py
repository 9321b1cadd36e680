"""What the stages that measure write of a tiny model, for the tests of those that read it."""

from __future__ import annotations

from pathlib import Path


def trees(source: Path, folder: Path, samples: int, length: int) -> dict[str, str]:
    """Measures a model; returns the folders of its calibration and sensitivity by these names."""
    from trimtab.components.calibration.work import calibrate
    from trimtab.components.quantization.mixed import sensitivity

    made = {name: str(folder / name) for name in ("calibration", "sensitivity")}
    for path in made.values():
        Path(path).mkdir()
    calibrate(str(source), made["calibration"], "", {"samples": samples, "length": length})
    parameters = {"formats": ["int8_wo", "int4_rtn"], "group_size": 32}
    sensitivity.measure(str(source), made["calibration"], made["sensitivity"], "", parameters)
    return made
