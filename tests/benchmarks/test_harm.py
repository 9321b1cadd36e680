"""benchmarks/harm.py: the sums of harms stand beside true losses, which they are near."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import tiny

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_harms_are_near_what_is_lost(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    harm = importlib.import_module("harm")
    model = tiny.write_model(tmp_path / "model")
    (tmp_path / "scratch").mkdir()
    options = argparse.Namespace(model=model, text=None, samples=4, windows=4, first_seed=0, bits=[6.0])
    options.blimp, options.pairs = None, 0
    found = harm.run(options, tmp_path / "scratch")
    assert len(found) == 3 * (4 + 1) + 1 and len(capsys.readouterr().out.splitlines()) > len(found)
    for title, row in found.items():  # of what attention reads, errors of all tokens go together, which no harm counts
        apart = title.startswith(("down_proj", "gate_proj", "o_proj"))
        assert row["true"] / (2 if apart else 6) < row["predicted"] < 2 * row["true"], (title, row)
    for form in ("nvfp4_wo", "int4_gptq", "fp8_gptq"):
        assert found["mixed_gpu, 6 bits"]["true"] < found["all, int4_gptq"]["true"]
        parts = [row["true"] for title, row in found.items() if title.endswith(f"its like, {form}")]
        assert max(parts) < found[f"all, {form}"]["true"] < 2 * sum(parts)


def test_a_layer_is_put_back(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    harm = importlib.import_module("harm")
    from safetensors.torch import load_file

    from trimtab.components.calibration.work import calibrate
    from trimtab.runtime.measure.measurements import Measurements

    model, calibration = tiny.write_model(tmp_path / "model"), tmp_path / "calibration"
    calibration.mkdir()
    calibrate(str(model), str(calibration), "", {"samples": 2, "length": 32})
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    losses = harm.Losses(model, Measurements(calibration, model, "calibration"), tokens)
    assert losses.of({}) == pytest.approx(0.0, abs=1e-9)
    assert losses.of({"model.layers.0.mlp.down_proj": "int4_gptq"}) > 1e-6
    assert losses.of({}) == pytest.approx(0.0, abs=1e-9)
