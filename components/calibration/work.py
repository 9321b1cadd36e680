"""One pass over the calibration text: what the methods need to know of a model's activations."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trimtab.base import progress
from trimtab.components.calibration import data
from trimtab.recipe import Calibration, files
from trimtab.runtime.checkpoint import experts
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.measure import measurements, observe, routing
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.measure.blockwise import Runner

#: What a mixture's shares of the tokens are called beside its name, among what is measured of a block.
_SHARES = ".shares"


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
    sample = data.draw(settings, checkpoints.load_tokenizer(Path(checkpoint)))
    folder = Path(output)
    found, shares = statistics(Path(checkpoint), sample.tokens, Path(scratch) / "blocks" if scratch else None)
    measurements.write(folder, Path(checkpoint), "statistics", found)
    save_file({"tokens": sample.tokens.int()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text(sample.text, encoding="utf-8")
    report = sample.report | ({"experts": _experts(shares, sample.tokens.numel())} if shares else {})
    (folder / "calibration.json").write_text(json.dumps(report), encoding="utf-8")
    if scratch:
        shutil.rmtree(Path(scratch) / "blocks")
    return {name: sample.report[name] for name in ("samples", "tokens", "vocabulary_coverage")}


def statistics(
    checkpoint: Path, tokens: torch.Tensor, scratch: Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Runs a checkpoint over the windows, int64 [samples, length], once; blocks with experts that saw too little of it
    once more.

    It goes a block at a time; a model that cannot is loaded whole.

    Args:
        scratch: what is measured of finished blocks waits there.

    Returns:
        `observe.Observation.tensors`, and `routing.shares`, which is empty for a model without experts.

    Raises:
        Failure: `unsupported`, an activation that is not finite: the model is damaged, or overflows.
    """
    try:
        runner = Runner(checkpoint, tokens, "calibrate", "measuring activations", scratch, caches=True)
    except NotByBlock as reason:
        progress.report("calibrate", f"loads the whole model, for {reason}")
        return whole(checkpoints.load_for_measuring(checkpoint)[0], tokens)
    found: dict[str, torch.Tensor] = {}
    by_block: dict[str, list[torch.Tensor]] = {name: [] for name in observe.BY_BLOCK}
    shares: dict[str, list[float]] = {}
    with torch.inference_mode(), runner:
        for measured in runner.run(partial(_of_block, runner), through=True):
            for name, tensor in measured.items():
                if name in by_block:
                    by_block[name].append(tensor)
                elif name.endswith(_SHARES):
                    shares[name.removesuffix(_SHARES)] = tensor.tolist()
                else:
                    found[name] = tensor
    return found | {name: torch.cat(parts) for name, parts in by_block.items()}, shares


def _of_block(runner: Runner, block: Block) -> dict[str, torch.Tensor]:
    """What is measured of one block, and of each mixture of experts the shares of the tokens."""
    with observe.observed(runner.model, [block.number]) as seen:
        runner.calls.new_cache = partial(observe.WatchedCache, runner.model, seen.caches)
        block.advance(keep_inputs=bool(block.mixtures))
        shares = routing.shares(block.mixtures, seen, block.tokens)
        if rare := routing.rare(shares, block.tokens):
            with routing.run_on_all(block.mixtures, rare):
                block.run()
    found = seen.tensors()
    observe.check_finite(found)
    return found | {f"{name}{_SHARES}": torch.tensor(each, dtype=torch.float64) for name, each in shares.items()}


@torch.inference_mode()
def whole(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Returns what `statistics` does, of a model in memory."""
    mixtures = experts.mixtures(model)
    with observe.observed(model) as seen:
        batches = observe.batches(model.device, tokens)
        for windows in progress.track(batches, "calibrate", "measuring activations", len(batches)):
            seen.run(model, windows)
        shares = routing.shares(mixtures, seen, tokens.numel())
        if rare := routing.rare(shares, tokens.numel()):
            count = sum(map(len, rare.values()))
            with routing.run_on_all(mixtures, rare):
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
