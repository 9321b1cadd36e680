"""One model in BF16 and in every format: quantized, checked, loaded, and timed in turns with BF16."""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_results import Results
from machine import CUDA, DEVICE, describe, log, peak, release, seconds_of, speed_limit
from safetensors.torch import save_file

from trimtab.recipe import Engine
from trimtab.runtime.checkpoint.model_files import weight_file_bytes
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.text import token_windows

PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,")
ROUNDS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
#: An emulated layer is unpacked for each token; a few tokens show that.
EMULATED_NEW_TOKENS = 8
#: Formats in the order of what is missed most if time runs out.
FORMATS = (
    "fp8", "int4_awq", "int8_sq", "fp8_per_channel", "int8_wo", "int4_gptq", "mixed", "int4_rtn",
    "nvfp4", "w4a8_awq", "mxfp4",
)  # fmt: skip
#: Formats that need Gram matrices, 32 GB of them for 32 blocks of 8B.
#: Formats that run the model.
LONG = ("int4_gptq", "mixed")


class Model:
    """A model, and what all of its formats share.

    Args:
        title: how the tables call it.
        folder: the Hugging Face folder.
        scratch: what is made there is removed when it has been measured.
        options: of the command line: `formats`, `quick`, and `text` to measure perplexity on.
        small: 135 million numbers, not 8 billion: Gram matrices fit, texts mean something, and checks take seconds.
    """

    def __init__(self, title: str, folder: Path, scratch: Path, options: argparse.Namespace, small: bool):
        self.title, self.folder, self.scratch, self.options, self.small = title, folder, scratch, options, small
        self.settings = Engine(max_batch_size=64, max_seq_len=1024)
        self.batches = (1, 8) if options.quick else (1, 8, 64)
        self.text = options.text if small else None
        self.trees: dict[str, str] = {}
        self.baseline: Any = None

    def run(self, results: Results) -> None:
        """Calibrates, and measures BF16 and every format."""
        found: dict[str, Any] = {"title": self.title, "rows": []}
        results.found["models"].append(found)
        with results.part(f"calibrate, {self.title}"):
            trees = self.scratch / f"{self.folder.name}-trees"
            self.trees = calibrate(self.folder, trees, found, self.small, self.options.quick)
        row: dict[str, Any] = {"format": "bf16"}
        found["rows"].append(row)
        with results.part(f"bf16, {self.title}"), peak(row, "serve_gib"):
            self.baseline = TorchEngine(self.folder, self.settings, str(DEVICE))
            measure(row, self.baseline, None, self.batches, self.text)
            row["loop_speed"] = round(loop_speed(self.baseline))
        formats = [name for name in self.options.formats if self.small or name not in LONG]
        if not self.small:
            found["left_out"] = f"{', '.join(LONG)}: GPTQ of a large model is measured by benchmarks/scale.py"
        longest = 0.0
        for name in formats:
            row = {"format": name}
            found["rows"].append(row)
            if results.left < longest:
                row["error"] = "left out: no time"
                continue
            started = time.perf_counter()
            log(f"{name}, {self.title}")
            try:
                self.run_format(row, name)
            except Exception as error:
                row["error"] = describe(error)
                traceback.print_exc()
            release()
            row["seconds"] = round(time.perf_counter() - started, 1)
            longest = max(longest, row["seconds"])
            results.write()
        self.baseline = None
        release()

    def run_format(self, row: dict[str, Any], name: str) -> None:
        """Fills the row of one format: quantized, checked, loaded and measured."""
        from trimtab.components.quantization import work

        if not self.trees:
            raise RuntimeError("calibration failed")
        parameters = {"format": name, "group_size": 64} | ({"effective_bits": 5.0} if name == "mixed" else {})
        export = self.scratch / f"export-{name}"
        export.mkdir()
        inputs = (str(self.folder), self.trees["calibration"], self.trees["sensitivity"] if name == "mixed" else None)
        try:
            with peak(row, "quantize_gib"):
                made = self.scratch / f"scratch-{name}"
                taken = seconds_of(lambda: work.quantize(*inputs, str(export), str(made), parameters))
            row["quantize_seconds"] = round(taken, 1)
            row["gb"] = round(weight_file_bytes(export) / 1e9, 3)
            if self.small:  # reading 16 GB again takes longer than all the rest
                row |= check(export, self.folder, self.scratch, parameters)
            with peak(row, "serve_gib"):
                engine = TorchEngine(export, self.settings, str(DEVICE))
                measure(row, engine, self.baseline, self.batches, self.text)
        finally:
            shutil.rmtree(export)


def calibrate(folder: Path, trees: Path, model: dict[str, Any], small: bool, quick: bool) -> dict[str, str]:
    """Measures statistics, for a small model sensitivity too, and what they cost."""
    from trimtab.components.calibration import data, work
    from trimtab.recipe import Calibration
    from trimtab.runtime.checkpoint import model_files
    from trimtab.runtime.measure import measurements

    found = {name: str(trees / name) for name in ("calibration", "sensitivity")}
    for path in found.values():
        Path(path).mkdir(parents=True)
    loaded, tokenizer = model_files.load_for_measuring(folder)
    settings = Calibration(samples=8, length=512) if CUDA else Calibration(samples=4, length=64)
    tokens = data.draw(settings, tokenizer).tokens
    seen: dict[str, torch.Tensor] = {}
    times: dict[str, list[float]] = {"forward": [], "statistics": []}
    for _ in range(3):
        times["forward"].append(seconds_of(lambda: bare_pass(loaded, tokens)))
        times["statistics"].append(seconds_of(lambda: seen.update(work.whole(loaded, tokens)[0])))
    model["tokens"] = tokens.numel()
    model |= {f"{name}_seconds": round(min(taken), 4) for name, taken in times.items()}
    model["statistics_over_forward"] = round(min(times["statistics"]) / min(times["forward"]), 2)
    loaded = None
    release()
    measurements.write(Path(found["calibration"]), folder, "statistics", seen)
    save_file({"tokens": tokens.int()}, Path(found["calibration"]) / "tokens.safetensors")
    (Path(found["calibration"]) / "calibration.json").write_text("{}", encoding="utf-8")  # no experts
    if small and not quick:
        from trimtab.components.quantization.mixed import sensitivity
        from trimtab.recipe import MIXED_FORMATS

        arguments = (str(folder), found["calibration"])
        scored = {"formats": list(MIXED_FORMATS), "group_size": 64}
        taken = seconds_of(lambda: sensitivity.measure(*arguments, found["sensitivity"], "", scored))
        model["sensitivity_seconds"] = round(taken, 1)
    return found


@torch.inference_mode()
def bare_pass(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    from trimtab.runtime.measure import observe

    for windows in observe.batches(model.device, tokens):
        model(windows, use_cache=False, logits_to_keep=1)


def check(export: Path, folder: Path, scratch: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Compares every layer of the export with its source."""
    from trimtab.components.validation.integrity import gate

    started = time.perf_counter()
    worst = gate.inspect(str(export), str(folder), str(scratch), "", parameters)["max_relative_error"]
    return {"largest_layer_error": round(worst, 4), "check_seconds": round(time.perf_counter() - started, 1)}


def measure(row: dict[str, Any], engine: Any, baseline: Any, batches: tuple[int, ...], text: str | None) -> None:
    """Adds kernels, size, continuations, perplexity and speed of an engine to its row."""
    kernels = engine.kernels().values()
    row["kernels"] = sorted({kernel["kernel"] for kernel in kernels})
    row["emulated"] = sum(kernel["emulated"] for kernel in kernels)
    row["layers"] = len(kernels)
    row["weight_gb"] = round(engine.weight_bytes / 1e9, 3)
    slow = 2 * row["emulated"] > row["layers"]
    prompts = [text.encode(engine.tokenizer, prompt) for prompt in PROMPTS]
    answers = engine.generate(prompts, max_new_tokens=8 if slow else 24)
    row["tokens_generated"] = [len(answer) for answer in answers]
    if text:
        row["texts"] = [engine.tokenizer.decode(answer) for answer in answers]
        row["perplexity"] = round(perplexity(engine, text), 3)
    new_tokens = EMULATED_NEW_TOKENS if slow or not CUDA else NEW_TOKENS
    row["speed"], row["over_bf16"], row["of_limit"] = {}, {}, {}
    for batch in batches[:1] if slow and not text else batches:
        own, ratios = [], []
        for _ in range(1 if slow and not text else ROUNDS):
            reference = baseline.decode_speed(batch, PROMPT_TOKENS, new_tokens, 1)[0] if baseline else math.nan
            own += engine.decode_speed(batch, PROMPT_TOKENS, new_tokens, 1)
            ratios.append(own[-1] / reference)
        row["speed"][str(batch)] = round(statistics.median(own), 1)
        limit = speed_limit(engine.model, batch, PROMPT_TOKENS + new_tokens / 2)
        row["of_limit"][str(batch)] = round(row["speed"][str(batch)] / limit, 3)
        if baseline:
            row["over_bf16"][str(batch)] = round(statistics.median(ratios), 3)
        row["decode_path"] = engine.decode_path


def perplexity(engine: Any, source: str) -> float:
    content = token_windows.read_text(source, ("trimtab.components.validation.suite", "heldout.txt"), field="--text")
    windows = token_windows.windows(engine.tokenizer, content, 256 if CUDA else 64, 16 if CUDA else 4)
    return math.exp(sum(engine.nll(windows)) / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.inference_mode()
def loop_speed(engine: Any) -> float:
    """Tokens a second at batch 1 where Python launches every kernel: what replaying saves."""
    from trimtab.runtime.decoder.decode import Growing

    decoder, new_tokens = Growing(engine.model), NEW_TOKENS if CUDA else EMULATED_NEW_TOKENS
    prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE)
    taken = []
    for _ in range(2):
        decoder.prefill(prompt)
        taken.append(seconds_of(lambda: decoder.steps(new_tokens)))
    return new_tokens / min(taken)
