"""What distillation wins back of what pruning lost, and how fast it trains beside a plain Hugging Face Trainer.

Run: python benchmarks/distillation.py --model FOLDER [--text FILE] [--blimp FOLDER] [--rows ...] [--quick]

The student is the model without its least influential blocks. `recovery` trains it on text by the teacher and on the
first 80 % of the file's lines, and measures on the last 20 % and on BLiMP: recovered is the share of the lost
log-perplexity. `throughput` takes turns between trimtab's loop, the same with stored logits, and a Trainer whose
compute_loss runs the teacher: same student, batches and precision (bfloat16 with float32 masters on a GPU).
`movement` sets movement pruning beside magnitude, `quantization_aware` training with rounded weights beside rounding
after training, and `equal_bytes` a pruned student in INT8 beside all blocks in as many bytes, each with
--comparison-tokens.
Defaults are meant for an H100. --quick takes seconds, without --model on a tiny random one, whose perplexities mean
nothing. The last line is one JSON object.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Measuring, add_arguments, short
from students import equal_bytes, movement, quantization_aware
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimtab.components.calibration.work import calibrate
from trimtab.components.distillation import data, generation, teacher, work
from trimtab.components.distillation.objective import Objective
from trimtab.components.distillation.training import Training
from trimtab.components.pruning.work import prune
from trimtab.recipe import Distillation
from trimtab.runtime import checkpoint

CUDA = torch.cuda.is_available()


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = _tiny(Path(folder))
        benchmark = _Benchmark(options, Path(folder))
        figures = {row: ROWS[row](benchmark) for row in options.rows}
    print(json.dumps({"device": torch.cuda.get_device_name() if CUDA else "cpu", **figures}))
    return 0


class _Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.measuring = Measuring(options, folder)
        self.model = str(options.model)
        self.text = [self.measuring.calibration(0)["text"]]
        self.student = str(self.new("student"))
        calibration = str(self.new("calibration"))
        calibrate(self.model, calibration, "", self.measuring.calibration(0))
        prune(self.model, calibration, self.student, "", {"method": "depth", "blocks": options.blocks})

    def new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def settings(self, **changes: Any) -> Distillation:
        chosen = {name: value for name, value in vars(self.options).items() if name in Distillation.model_fields}
        return Distillation(**{**chosen, "text": self.text, **changes})

    def stage(self, name: str, work: Callable[..., dict[str, float]], settings: Distillation, **trees: str) -> str:
        """Does a stage's work as the pipeline would, prints what it returns, and returns its tree."""
        output, started = str(self.new(name)), time.perf_counter()
        metrics = work(output=output, scratch=f"{output}-scratch", parameters=_parameters(settings), **trees)
        told = ", ".join(f"{key} {value:,.4g}" for key, value in metrics.items() if key != "curve")
        print(f"{name}: {told}, seconds {time.perf_counter() - started:.1f}", flush=True)
        return output

    @cached_property
    def generated(self) -> dict[str, str]:
        """The tree of text by the teacher, once for all rows; none where --generate is 0."""
        settings = self.settings()
        if not settings.generate:
            return {}
        return {"generated": self.stage("generate", generation.generate, settings, model=self.model)}


def recovery(benchmark: _Benchmark) -> dict[str, Any]:
    """Perplexity and BLiMP of the model, of the pruned student, and of the same distilled."""
    settings, started = benchmark.settings(), time.perf_counter()
    trees = dict(benchmark.generated)
    if settings.stored_logits:
        stored = benchmark.stage("teach", teacher.teach, settings, model=benchmark.model, **trees)
        trees["teacher_logits"] = stored
    trees |= {"checkpoint": benchmark.student, "model": benchmark.model}
    distilled = benchmark.stage("distill", work.distill, settings, **trees)
    seconds = time.perf_counter() - started
    told = json.loads((Path(distilled) / "distillation.json").read_text(encoding="utf-8"))
    print("held-out loss by tokens: ", end="")
    print(", ".join(f"{step * told['tokens_per_step']:,} {loss:.4f}" for step, loss in told["heldout"]))
    folders = {"dense": benchmark.model, "pruned": benchmark.student, "distilled": distilled}
    rows = {name: short(benchmark.measuring.measure(Path(folder))) for name, folder in folders.items()}
    print(f"{'model':<12}{'perplexity':>12}{'BLiMP':>9}")
    for name, row in rows.items():
        print(f"{name:<12}{row['perplexity']:>12.3f}{row.get('blimp', math.nan):>9.4f}")
    lost, left = (math.log(rows[name]["perplexity"] / rows["dense"]["perplexity"]) for name in ("pruned", "distilled"))
    recovered = 1 - left / lost
    print(f"recovered: {recovered:.1%} of {lost:.3f} nats, with {settings.tokens:,} tokens in {seconds:.0f} s")
    return {**rows, "recovered": recovered, "lost": lost, "seconds": seconds, "heldout": told["heldout"]}


def throughput(benchmark: _Benchmark) -> dict[str, Any]:
    """Tokens/s of a training step, medians over rounds in which the three take turns."""
    options = benchmark.options
    settings = benchmark.settings(generate=0, stored_logits=0)
    tokenizer = checkpoint.load_tokenizer(options.model)
    windows = data.read(tokenizer, settings.texts, settings.length)
    kept = benchmark.settings(generate=0, stored_logits=options.stored_logits or 64)
    tree = benchmark.stage("teach", teacher.teach, kept, model=benchmark.model)
    ways = {
        "trimtab": lambda: _ours(benchmark, settings, windows, None),
        "trimtab, stored logits": lambda: _ours(benchmark, kept, windows, tree),
        "Trainer": lambda: _plain(benchmark, settings, windows),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    peak = dict.fromkeys(ways, 0.0)
    for number in range(options.rounds):
        for name, measure in ways.items():
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found[name].append(measure())
            peak[name] = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
            print(f"round {number + 1}: {name} {found[name][-1]:,.0f} tokens/s, {peak[name]:.1f} GB", flush=True)
    speeds = {name: statistics.median(values) for name, values in found.items()}
    ratios = {name: speeds[name] / speeds["Trainer"] for name in ways if name != "Trainer"}
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + " times the Trainer")
    return {"tokens_per_second": speeds, "over_trainer": ratios, "peak_gb": peak}


def _ours(benchmark: _Benchmark, settings: Distillation, windows: data.Windows, stored: str | None) -> float:
    options = benchmark.options
    student, _ = checkpoint.load_for_measuring(Path(benchmark.student))
    source = work.teacher_of(Path(benchmark.model), stored, windows, student.device)
    batches = data.Batches(windows.training, settings)
    training = Training(Objective(student, source, settings), windows.heldout, batches, settings, benchmark.new("run"))
    student.train()
    for step in range(options.warmup_steps):
        training.step(step)
    started = _now()
    for step in range(options.steps):
        training.step(options.warmup_steps + step)
    return options.steps * batches.tokens_per_step / (_now() - started)


def _plain(benchmark: _Benchmark, settings: Distillation, windows: data.Windows) -> float:
    """A Trainer as its documentation has it: float32 weights, bfloat16 autocast and fused AdamW on a GPU."""
    options = benchmark.options
    student, _ = checkpoint.load(Path(benchmark.student), torch.float32)
    source, _ = checkpoint.load_for_measuring(Path(benchmark.model))
    arguments = TrainingArguments(
        output_dir=str(benchmark.new("trainer")),
        per_device_train_batch_size=settings.batch_size // settings.gradient_accumulation,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=options.warmup_steps + options.steps,
        learning_rate=settings.learning_rate,
        bf16=CUDA,
        use_cpu=not CUDA,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = _Clock(options.warmup_steps)
    rows = [{"input_ids": window} for window in windows.training]
    trainer = _Distiller(model=student, args=arguments, train_dataset=rows, callbacks=[clock])
    trainer.source = source
    trainer.train()
    return options.steps * settings.batch_size * settings.length / (_now() - clock.started)


class _Distiller(Trainer):
    source: torch.nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, use_cache=False)
        with torch.no_grad():
            target = self.source(**inputs, use_cache=False).logits
        student = F.log_softmax(output.logits[:, :-1].flatten(0, 1).float(), dim=-1)
        wanted = F.log_softmax(target[:, :-1].flatten(0, 1).float(), dim=-1)
        loss = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
        return (loss, output) if return_outputs else loss


class _Clock(TrainerCallback):
    def __init__(self, after: int):
        self.after, self.started = after, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.started = _now()


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def _parameters(settings: Distillation) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "text": list(settings.texts)}


def _tiny(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny

    return tiny.write_model(folder / "tiny", layers=4)


ROWS = {
    "throughput": throughput,
    "recovery": recovery,
    "movement": movement,
    "quantization_aware": quantization_aware,
    "equal_bytes": equal_bytes,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, needs_model=False)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--blocks", type=int, default=6, help="blocks that the student lacks")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens to train on")
    parser.add_argument("--generate", type=int, default=1_000_000, help="tokens by the teacher")
    parser.add_argument("--batch-size", type=int, default=64, help="windows a step")
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--loss", choices=("forward_kl", "reverse_kl"), default="forward_kl")
    parser.add_argument("--stored-logits", type=int, default=0, help="for `recovery`; throughput's are 64")
    parser.add_argument("--comparison-tokens", type=int, default=2_500_000, help="of each student that is compared")
    parser.add_argument("--comparison-batch-size", type=int, default=16, help="windows a step of theirs")
    parser.add_argument("--comparison-learning-rate", type=float, default=3e-4)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.85, 0.5], help="of `movement`")
    parser.add_argument("--group-size", type=int, default=64, help="of INT4")
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
