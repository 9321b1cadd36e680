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
from trimtab.runtime.measure import measurements, observe, routing


def calibrate(checkpoint: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Measures a checkpoint on calibration text and writes the calibration tree.

    `tokens.safetensors` holds `tokens`, int32 [samples, length]; `statistics.safetensors` what
    `observe.Observation.tensors` gives: maximum and second moment of every linear layer's input, the influence of
    every block (Men et al. 2024, ShortGPT), the ranges of its keys and values. `text.txt` is the text of the
    windows, for the check of overlap, and `calibration.json` the report of `data.Sample`; of a model with experts also
    `experts`: how many there are, the least and the mean share of the tokens that one was given, and `rare`, those that
    were given too few and were measured on every token instead, as {mixture: {expert: share}}.

    Returns:
        samples, tokens, vocabulary_coverage (share of the vocabulary that occurs).
    """
    settings = Calibration.model_validate(files.without(parameters))
    model, tokenizer = checkpoints.load_for_measuring(Path(checkpoint))
    sample = data.draw(settings, tokenizer)
    folder = Path(output)
    found, shares = statistics(model, sample.tokens)
    measurements.write(folder, Path(checkpoint), "statistics", found)
    save_file({"tokens": sample.tokens.int()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text(sample.text, encoding="utf-8")
    report = sample.report | ({"experts": _experts(shares, sample.tokens.numel())} if shares else {})
    (folder / "calibration.json").write_text(json.dumps(report), encoding="utf-8")
    return {name: sample.report[name] for name in ("samples", "tokens", "vocabulary_coverage")}


@torch.inference_mode()
def statistics(
    model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Runs the model over the windows, int64 [samples, length], once; experts that saw too little of it once more.

    Returns:
        `observe.Observation.tensors`, and `routing.shares`, which is empty for a model without experts.

    Raises:
        Failure: `unsupported`, an activation that is not finite: the model is damaged, or overflows.
    """
    with observe.observed(model) as seen:
        batches = observe.batches(model, tokens)
        for windows in progress.track(batches, "calibrate", "measuring activations", len(batches)):
            seen.run(model, windows)
        shares = routing.shares(model, seen, tokens.numel())
        if rare := routing.rare(shares, tokens.numel()):
            count = sum(map(len, rare.values()))
            with routing.run_on_all(model, rare):
                for windows in progress.track(batches, "calibrate", f"measuring {count} rare experts", len(batches)):
                    seen.run(model, windows)
    found = seen.tensors()
    observe.check_finite(found)
    return found, shares


def _experts(shares: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    each = [share for some in shares.values() for share in some]
    rare = routing.rare(shares, tokens)
    named = {name: {str(number): shares[name][number] for number in numbers} for name, numbers in rare.items()}
    return {"count": len(each), "least": min(each), "mean": sum(each) / len(each), "rare": named}


def rare_experts(calibration: Path) -> dict[str, list[int]]:
    """Returns the experts that a calibration found too few tokens for, by their mixture."""
    report = json.loads((calibration / "calibration.json").read_text(encoding="utf-8"))
    return {name: [int(n) for n in few] for name, few in report.get("experts", {}).get("rare", {}).items()}
