"""The row `throughput` of benchmarks/distillation.py: trimtab's loop beside a Trainer of Hugging Face's."""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimtab.components.distillation import work
from trimtab.components.distillation.objective import teacher
from trimtab.components.distillation.objective.objective import Objective
from trimtab.components.distillation.text import data
from trimtab.components.distillation.training.training import Training
from trimtab.recipe import Distillation
from trimtab.runtime.checkpoint import model_files

CUDA = torch.cuda.is_available()


def compared(benchmark: Any) -> dict[str, Any]:
    """Tokens/s of a training step, medians over rounds in which the three take turns."""
    options = benchmark.options
    settings = benchmark.settings(generate=0, stored_logits=0)
    tokenizer = model_files.load_tokenizer(options.model)
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


def _ours(benchmark: Any, settings: Distillation, windows: data.Windows, stored: str | None) -> float:
    options = benchmark.options
    student, _ = model_files.load_for_measuring(Path(benchmark.student))
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


def _plain(benchmark: Any, settings: Distillation, windows: data.Windows) -> float:
    """A Trainer as its documentation has it: float32 weights, bfloat16 autocast and fused AdamW on a GPU."""
    options = benchmark.options
    student, _ = model_files.load(Path(benchmark.student), torch.float32)
    source, _ = model_files.load_for_measuring(Path(benchmark.model))
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
