"""What measuring a model costs beside only running it on the same tokens, and what the second attempt pays.

Run: python benchmarks/calibration.py [--model FOLDER | --eight-billion] [--profile] [--quick]

Without --model, a Llama of SmolLM2-135M's shape with random weights, or of Llama-3.1-8B's. Passes alternate, so that
a busy machine disturbs all alike. The last line is one JSON object: seconds of each pass, their ratio to the bare
forward pass, and the seconds of a calibration that the store already holds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from machine import seconds_of
from random_model import EIGHT_BILLION, SMALL, random_model
from transformers import PreTrainedModel

from trimtab import stages
from trimtab.components.calibration.work import whole as measure
from trimtab.loop.state import State
from trimtab.recipe import Recipe
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.measure import gradients, observe
from trimtab.store import open_store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face model folder")
    parser.add_argument(
        "--eight-billion", action="store_true", help="Llama-3.1-8B's shape, forward and statistics alone (16 GB)"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels on which statistics spend a GPU")
    parser.add_argument("--samples", type=int, default=8, help="windows of 512 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two windows, three rounds")
    options = parser.parse_args()
    samples, rounds = (2, 3) if options.quick else (options.samples, options.rounds)
    shape = EIGHT_BILLION if options.eight_billion else SMALL
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or random_model(Path(scratch) / "model", shape)
        model = model_files.load_for_measuring(folder)[0]
    tokens = torch.randint(model.config.vocab_size, (samples, 512), device=model.device)
    passes = {"forward": _forward, "statistics": measure, "gram": _gram, "gradients": _gradients}
    if options.eight_billion:  # Gram matrices of this shape take 33 GB and gradients as much as the weights
        passes = {name: passes[name] for name in ("forward", "statistics")}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    _forward(model, tokens)  # the first pass allocates
    for _ in range(rounds):
        for name, run in passes.items():
            seconds[name].append(seconds_of(partial(run, model, tokens.clone())))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: statistics.median(map(truediv, taken, seconds["forward"])) for name, taken in seconds.items()}
    print(f"{samples} x 512 tokens on {model.device.type}, {rounds} rounds")
    print(f"{'pass':<12}{'seconds':>9}{'ratio':>8}")
    for name in passes:
        print(f"{name:<12}{medians[name]:>9.2f}{ratios[name]:>8.3f}")
    if options.profile:
        _profile(model, tokens)
    second = _second_attempt()
    print(f"a calibration that the store holds: {second:.3f} s, without loading the model")
    print(json.dumps({"device": model.device.type, "seconds": medians, "ratios": ratios, "second_attempt": second}))
    return 0


@torch.inference_mode()
def _forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    for windows in observe.batches(model.device, tokens):
        model(windows, logits_to_keep=1)


@torch.inference_mode()
def _gram(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    layers = observe.linears(model)
    with observe.grams({g.layers[0]: layers[g.layers[0]] for g in observe.linear_groups(model)}):
        _forward(model, tokens)


def _gradients(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    gradients.whole(model, tokens, "benchmark")


def _profile(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        seconds_of(partial(measure, model, tokens))
    print(profiled.key_averages().table(sort_by="self_device_time_total", row_limit=16, max_name_column_width=60))
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=60))


def _second_attempt() -> float:
    """The seconds of the calibrate stage when an earlier attempt, or another run, has measured the model."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/store")
        source = Path(folder) / "model"
        source.mkdir()
        (source / "weights").write_bytes(b"0")
        model = store.put(source, kind="checkpoint")
        recipe = Recipe.parse("quantize: {format: int4_awq}")
        state = State(store=store.uri, goal="fit_larger_model", target="cpu", model=model, recipe=recipe)
        stage = stages.STAGES["recalibrate"]
        key = stages.key_here(stage, state)
        store.record(key, {"tree": model.model_dump(), "metrics": {}, "seconds": 1.0})
        started = time.perf_counter()
        _, result = stages.advance("recalibrate", state)
        assert result.hit
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
