"""One pass over the calibration text: what the methods need to know of a model's activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trimtab import files, progress
from trimtab.components.calibration import data
from trimtab.recipe import Calibration
from trimtab.runtime import checkpoint as checkpoints
from trimtab.runtime import observe


def calibrate(checkpoint: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Measures a checkpoint on calibration text and writes the calibration tree.

    `tokens.safetensors` holds `tokens`, int32 [samples, length]; `statistics.safetensors` holds for each
    linear layer `<name>.amax` and `<name>.second_moment` of its input, float32 [in_features], and
    `block_influence`, float32 [blocks]: one minus the mean cosine between a block's input and output
    (Men et al. 2024, ShortGPT). `text.txt` is the text of the windows, for the check of overlap, and
    `calibration.json` the report of `data.Sample`.

    Returns:
        samples, tokens, vocabulary_coverage (share of the vocabulary that occurs).
    """
    settings = Calibration.model_validate(files.without(parameters))
    model, tokenizer = checkpoints.load(Path(checkpoint), torch.float32)
    sample = data.draw(settings, tokenizer)
    tokens = sample.tokens
    with torch.inference_mode(), observe.observed(model) as (inputs, similarities):
        for window in progress.track(tokens, "calibrate", "measuring activations", len(tokens)):
            model(window[None], logits_to_keep=1)
    statistics = {"block_influence": torch.tensor([1 - s.mean for s in similarities])}
    for name, seen in inputs.items():
        statistics[f"{name}.amax"] = seen.amax
        statistics[f"{name}.second_moment"] = seen.second_moment
    folder = Path(output)
    save_file({"tokens": tokens.int()}, folder / "tokens.safetensors")
    save_file(statistics, folder / "statistics.safetensors")
    (folder / "text.txt").write_text(sample.text, encoding="utf-8")
    (folder / "calibration.json").write_text(json.dumps(sample.report), encoding="utf-8")
    return {name: sample.report[name] for name in ("samples", "tokens", "vocabulary_coverage")}
