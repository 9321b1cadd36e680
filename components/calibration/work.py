"""One pass over the calibration text: what the methods need to know of a model's activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trimtab.base import progress
from trimtab.components.calibration import data
from trimtab.recipe import Calibration, files
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.measure import measurements, observe


def calibrate(checkpoint: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Measures a checkpoint on calibration text and writes the calibration tree.

    `tokens.safetensors` holds `tokens`, int32 [samples, length]; `statistics.safetensors` what
    `observe.Observation.tensors` gives: maximum and second moment of every linear layer's input, the influence of
    every block (Men et al. 2024, ShortGPT), the ranges of its keys and values. `text.txt` is the text of the
    windows, for the check of overlap, and `calibration.json` the report of `data.Sample`.

    Returns:
        samples, tokens, vocabulary_coverage (share of the vocabulary that occurs).
    """
    settings = Calibration.model_validate(files.without(parameters))
    model, tokenizer = checkpoints.load_for_measuring(Path(checkpoint))
    sample = data.draw(settings, tokenizer)
    folder = Path(output)
    measurements.write(folder, Path(checkpoint), "statistics", statistics(model, sample.tokens))
    save_file({"tokens": sample.tokens.int()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text(sample.text, encoding="utf-8")
    (folder / "calibration.json").write_text(json.dumps(sample.report), encoding="utf-8")
    return {name: sample.report[name] for name in ("samples", "tokens", "vocabulary_coverage")}


@torch.inference_mode()
def statistics(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the model over the windows, int64 [samples, length], and returns `observe.Observation.tensors`.

    Raises:
        Failure: `unsupported`, an activation that is not finite: the model is damaged, or overflows.
    """
    with observe.observed(model) as seen:
        batches = observe.batches(model, tokens)
        for windows in progress.track(batches, "calibrate", "measuring activations", len(batches)):
            seen.run(model, windows)
    found = seen.tensors()
    observe.check_finite(found)
    return found
