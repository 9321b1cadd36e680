"""What distillation wins back of what pruning lost, and how fast it trains beside a plain Hugging Face Trainer.

Run: python benchmarks/distillation.py --model FOLDER [--text FILE] [--blimp FOLDER] [--rows ...] [--minutes N]
    [--out FILE] [--quick]

The student is the model without its least influential blocks. Students train on the first 80 % of the file's lines
and on text that the teacher writes; the last 20 % and BLiMP measure them. The rows, in the order of the defaults:

- recovery: the share of the lost log-perplexity that --tokens win back
- movement: movement pruning beside gradual magnitude pruning, --comparison-tokens for each
- quantization_aware: training with rounded weights beside rounding after training
- activations_aware: training with NVFP4's rounded weights, without and with its rounded activations
- equal_bytes: the student of `recovery` in INT8 beside all blocks in as many bytes
- movement_otherwise: magnitude pruning at once, and movement whose scores count less, or alone as in the paper
- processes: one process, and several that hold a part each of student, optimizer and teacher: tokens/s with loading and
  saving, and the memory of a GPU; --gpus says how many
- throughput: trimtab's loop, the same with stored logits, and a Trainer whose compute_loss runs the teacher, by turns:
  same student, batches and precision (bfloat16 with float32 masters on a GPU)

Defaults are meant for an H100 or H200. Each figure is appended to --out as a line of JSON as soon as it is known. With
--minutes, what would not end in time is left out, and the next row is tried. --quick takes seconds, without --model on
a tiny random one, whose perplexities mean nothing. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measuring import Measuring, add_arguments, short
from students import activations_aware, equal_bytes, movement, movement_otherwise, quantization_aware

from trimtab.components.calibration.work import calibrate
from trimtab.components.distillation import work
from trimtab.components.distillation.objective import teacher
from trimtab.components.distillation.text import generation
from trimtab.components.pruning.work import prune
from trimtab.recipe import Distillation

CUDA = torch.cuda.is_available()
#: Tokens/s and seconds beside them that a training is expected to take before one was timed.
EXPECTED_SPEED, SECONDS_BESIDE = (60_000 if CUDA else 100), 15


class OutOfTime(Exception):
    """What comes next would not end within --minutes."""


def main() -> int:
    options = _options()
    found: dict[str, dict[str, Any]] = {row: {} for row in options.rows}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = _tiny(Path(folder))
        benchmark = _Benchmark(options, Path(folder))
        for row in options.rows:
            try:
                for name, figures in ROWS[row](benchmark):
                    found[row][name] = figures
                    _write(options.out, {"row": row, "name": name, "minutes": benchmark.minutes, **figures})
            except OutOfTime as error:
                print(f"{row}: {error}", flush=True)
            except Exception as error:  # the other rows are worth having
                traceback.print_exc()
                _write(options.out, {"row": row, "error": f"{type(error).__name__}: {error}"})
                failed = True
    print(json.dumps({"device": torch.cuda.get_device_name() if CUDA else "cpu", **found}))
    return int(failed)


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
        file.flush()
        os.fsync(file.fileno())


class _Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.started, self.speed = time.perf_counter(), EXPECTED_SPEED
        self.measuring = Measuring(options, folder)
        self.model = str(options.model)
        self.text = [self.measuring.calibration(0)["text"]]

    def new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return round((time.perf_counter() - self.started) / 60, 2)

    def settings(self, **changes: Any) -> Distillation:
        chosen = {name: value for name, value in vars(self.options).items() if name in Distillation.model_fields}
        return Distillation(**{**chosen, "text": self.text, **changes})

    def stage(self, name: str, work: Callable[..., dict[str, Any]], settings: Distillation, **inputs: Any) -> str:
        """Does a stage's work as the pipeline would, prints what it returns, and returns its tree."""
        output, started = str(self.new(name)), time.perf_counter()
        metrics = work(output=output, scratch=f"{output}-scratch", parameters=_parameters(settings), **inputs)
        told = ", ".join(f"{key} {value:,.4g}" for key, value in metrics.items() if key != "curve")
        print(f"{name}: {told}, seconds {time.perf_counter() - started:.1f}", flush=True)
        return output

    def require(self, seconds: float, what: str) -> None:
        """Raises OutOfTime where --minutes leave less."""
        left = 60 * (self.options.minutes - self.minutes)
        if seconds > left:
            raise OutOfTime(f"{what} is left out: it takes about {seconds:.0f} s, and {left:.0f} s are left")

    def measure(self, name: str, folder: str) -> dict[str, float]:
        """The perplexity and BLiMP accuracy of a reloaded folder."""
        found = short(self.measuring.measure(Path(folder)))
        print(f"{name:<44}{found['perplexity']:>14.3f}{found.get('blimp', math.nan):>9.4f}", flush=True)
        return found

    def distil(self, name: str, student: str, settings: Distillation, weights: dict[str, Any] | None = None) -> str:
        """Trains a student of the model; `weights` is what the recipe's other sections want of them."""

        def distill(parameters: dict[str, Any], **folders: str) -> dict[str, Any]:
            return work.distill(parameters={**parameters, "weights": weights or {}}, **folders)

        trees = {"checkpoint": student, "model": self.model, **self.generated}
        self.require(settings.tokens / self.speed + SECONDS_BESIDE, name)
        if settings.stored_logits:
            trees["teacher_logits"] = self.stage("teach", teacher.teach, settings, model=self.model, **self.generated)
        started = time.perf_counter()
        folder = self.stage("distill", distill, settings, **trees)
        self.speed = settings.tokens / (time.perf_counter() - started)
        return folder

    @cached_property
    def generated(self) -> dict[str, str]:
        """The tree of text by the teacher, once for all rows; none where --generate is 0."""
        settings = self.settings()
        if not settings.generate:
            return {}
        seconds = self.options.generate_seconds
        tree = self.stage("generate", generation.generate, settings, model=self.model, seconds=seconds)
        return {"generated": tree}

    @cached_property
    def calibrated(self) -> str:
        """What calibration measured of the model."""
        return self.calibrate(self.model)

    def calibrate(self, checkpoint: str) -> str:
        """The tree of what calibration measures of a checkpoint."""
        folder = str(self.new("calibration"))
        calibrate(checkpoint, folder, "", self.measuring.calibration(0))
        return folder

    @cached_property
    def student(self) -> str:
        """The model without --blocks blocks."""
        folder, parameters = str(self.new("student")), {"method": "depth", "blocks": self.options.blocks}
        prune(self.model, self.calibrated, folder, f"{folder}-scratch", parameters)
        return folder

    @cached_property
    def recovered(self) -> str:
        """The same distilled with --tokens."""
        return self.distil("recovery", self.student, self.settings())


def recovery(benchmark: _Benchmark) -> Iterator[tuple[str, dict[str, Any]]]:
    """Perplexity and BLiMP of the model, of the pruned student, and of the same distilled."""
    dense, pruned = benchmark.measure("dense", benchmark.model), benchmark.measure("pruned", benchmark.student)
    yield "dense", dense
    yield "pruned", pruned
    told = json.loads((Path(benchmark.recovered) / "distillation.json").read_text(encoding="utf-8"))
    print("held-out loss by tokens: ", end="")
    print(", ".join(f"{step * told['tokens_per_step']:,} {loss:.4f}" for step, loss in told["heldout"]))
    distilled = benchmark.measure("distilled", benchmark.recovered)
    lost, left = (math.log(row["perplexity"] / dense["perplexity"]) for row in (pruned, distilled))
    tokens = len(told["train"]) * told["tokens_per_step"]
    print(f"recovered: {1 - left / lost:.1%} of {lost:.3f} nats, with {tokens:,} tokens", flush=True)
    figures = {"recovered": 1 - left / lost, "lost": lost, "tokens": tokens, "heldout": told["heldout"]}
    yield "distilled", {**distilled, **figures}


def processes(benchmark: _Benchmark) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds, tokens/s, the held-out loss and the bytes of a GPU, for each number of processes."""
    for count in benchmark.options.gpus:
        settings = benchmark.settings(tokens=benchmark.options.comparison_tokens, processes=count, stored_logits=0)
        output, started = str(benchmark.new("processes")), time.perf_counter()
        trees = {"checkpoint": benchmark.student, "model": benchmark.model}
        metrics = work.distill(output=output, scratch=f"{output}-scratch", parameters=_parameters(settings), **trees)
        seconds = time.perf_counter() - started
        speed, own = metrics["tokens"] / seconds, torch.cuda.max_memory_reserved() if CUDA else 0
        figures = {"seconds": seconds, "tokens/s": speed, "gpu_bytes": metrics.get("peak_gpu_bytes", own)}
        print(f"{count} processes: {speed:,.0f} tokens/s, {figures['gpu_bytes'] / 1e9:.1f} GB", flush=True)
        yield f"{count} processes", {**figures, "heldout_loss": metrics["heldout_loss_after"]}


def throughput(benchmark: _Benchmark) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tokens/s of a training step beside a Trainer's."""
    from throughput import compared  # needs accelerate

    yield "tokens/s", compared(benchmark)


def _parameters(settings: Distillation) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "text": list(settings.texts)}


def _tiny(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny

    return tiny.write_model(folder / "tiny", layers=4)


ROWS: dict[str, Callable[[_Benchmark], Iterator[tuple[str, dict[str, Any]]]]] = {
    "recovery": recovery,
    "movement": movement,
    "quantization_aware": quantization_aware,
    "activations_aware": activations_aware,
    "equal_bytes": equal_bytes,
    "movement_otherwise": movement_otherwise,
    "processes": processes,
    "throughput": throughput,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, needs_model=False)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="that the run may take")
    parser.add_argument("--out", type=Path, help="a file that each figure is appended to")
    parser.add_argument("--blocks", type=int, default=6, help="blocks that the student lacks")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens to train on")
    parser.add_argument("--generate", type=int, default=2_000_000, help="tokens by the teacher")
    parser.add_argument("--generate-seconds", type=float, default=math.inf, help="that the teacher may write")
    parser.add_argument("--batch-size", type=int, default=32, help="windows a step")
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--loss", choices=("forward_kl", "reverse_kl"), default="forward_kl")
    parser.add_argument("--stored-logits", type=int, default=0, help="for `recovery`; throughput's are 64")
    parser.add_argument("--comparison-tokens", type=int, default=2_500_000, help="of each student that is compared")
    parser.add_argument("--comparison-batch-size", type=int, default=16, help="windows a step of theirs")
    parser.add_argument("--comparison-learning-rate", type=float, default=6e-4)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.85, 0.5], help="of `movement`")
    parser.add_argument("--group-size", type=int, default=64, help="of INT4")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2], help="that share a training, of `processes`")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--steps", type=int, default=20, help="timed in a round")
    parser.add_argument("--warmup-steps", type=int, default=5, help="before them")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args()
    if options.model is None and not options.quick:
        parser.error("--model is required, but for --quick")
    if options.quick:
        options.blocks, options.tokens, options.generate = 2, 20 * 4 * 64, 20 * 64
        options.batch_size, options.length, options.stored_logits = 4, 64, 16
        options.comparison_tokens, options.comparison_batch_size, options.group_size = 10 * 4 * 64, 4, 32
        options.samples, options.windows, options.pairs = 2, 2, 5
        options.rounds, options.steps, options.warmup_steps = 1, 5, 2
    return options


if __name__ == "__main__":
    sys.exit(main())
