"""What the stages of an attempt take as a model grows: seconds, and the peaks of GPU and host memory, with a GPU's
memory capped or not.

Run: python benchmarks/scale.py --model FOLDER [--shape 8B|32B] [--caps none 40] [--attempts fp8 int4_gptq] [--quick]

--model is SmolLM2-135M, which is grown to the shape (`grown_model`); with --grown FOLDER a model grown before is used,
or kept there. Each stage runs in a process of its own, whose GPU memory is capped at so many GB; `none` does not cap.
What the stages made under each cap is compared with what the first one made. --attempts runs a whole attempt in each of
these formats besides, from an empty store to the verdict. --quick grows a tiny random model on the CPU.
The last line is one JSON object; the exit code is 1 where a stage failed.

Host memory is counted without the pages of files, which a machine takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from grown_model import SHAPES, grow
from machine import CUDA, describe, log, release, synchronize, versions
from random_model import random_model
from safetensors.torch import load_file

#: In order: what reads what another made comes behind it. `whole` loads the model at once, for comparison.
STAGES = (
    "whole", "calibrate", "sensitivity", "fp8", "int4_awq", "int4_gptq", "int4_gptq, at once", "sparsegpt",
    "integrity of fp8", "integrity of int4_gptq", "score of int4_gptq",
)  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}  # fmt: skip
TINY_GROWN = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
QUICK = ("whole", "calibrate", "fp8", "int4_gptq", "sparsegpt")
GB = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with SmolLM2-135M")
    parser.add_argument("--grown", type=Path, help="where the grown model is, or is kept")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--caps", nargs="+", default=["none"], help="GB of GPU memory, or none")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", default="builtin", help="what calibrates, as a recipe names it")
    parser.add_argument("--target", default="h200", help="of --attempts")
    parser.add_argument("--attempts", nargs="*", metavar="FORMAT", default=[])
    parser.add_argument("--scratch", type=Path, help="a disk with room for the model and its exports")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(json.loads(options.child))
    if options.quick:
        options.stages, options.samples, options.length = list(QUICK), 4, 64
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        figures = _measure(options, Path(scratch))
    print(json.dumps(figures))
    return int(any("failed" in row for rows in figures["caps"].values() for row in rows.values()))


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model, found = options.grown or scratch / "model", {**versions(), "caps": {}}
    if not (model / "config.json").is_file():
        source = random_model(scratch / "tiny", TINY) if options.quick else options.model
        started = time.perf_counter()
        found["parameters"] = grow(source, model, TINY_GROWN if options.quick else SHAPES[options.shape])
        log(f"grown to {found['parameters']:,} parameters in {time.perf_counter() - started:.0f} s")
        release()
    calibrate = {"samples": options.samples, "length": options.length, "text": options.text}
    print(f"{'cap GB':<8}{'stage':<24}{'seconds':>9}{'GPU GB':>9}{'host GB':>9}")
    for cap in options.caps:
        folder, rows = scratch / f"cap-{cap}", {}
        for stage in options.stages:
            asked = {"stage": stage, "model": str(model), "folder": str(folder), "calibrate": calibrate, "cap": cap}
            rows[stage] = row = _in_a_process(asked)
            log(row["failed"]) if "failed" in row else None
            cells = [row.get("seconds", float("nan")), row.get("gpu_gb", 0.0), row.get("host_gb", 0.0)]
            print(f"{cap:<8}{stage:<24}{cells[0]:>9.1f}{cells[1]:>9.2f}{cells[2]:>9.2f}", flush=True)
        if cap != options.caps[0]:
            rows["compared"] = _compared(scratch / f"cap-{options.caps[0]}", folder)
            log(f"beside {options.caps[0]}: {rows['compared']}")
        found["caps"][cap] = rows
    if options.attempts:
        found["attempts"] = {form: _attempt(form, model, calibrate, options, scratch) for form in options.attempts}
    return found


def _in_a_process(asked: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"failed": f"{asked['stage']} ended with {done.returncode}"}


def _child(asked: dict[str, Any]) -> int:
    """Runs one stage, capped, and prints its figures."""
    if CUDA and asked["cap"] != "none":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(asked["cap"]) * GB / total))
    folder, row = Path(asked["folder"]), {}
    work = _work(asked["stage"], asked["model"], folder, asked["calibrate"])
    host = _HostPeak()
    host.start()
    started = time.perf_counter()
    try:
        row |= work() or {}
        synchronize()
        row["seconds"] = round(time.perf_counter() - started, 2)
    except Exception as error:
        row["failed"] = describe(error)
    host.ended.set()
    host.join()
    row["host_gb"] = round(host.bytes / GB, 3)
    if CUDA:
        row["gpu_gb"] = round(torch.cuda.max_memory_allocated() / GB, 3)
        row["gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / GB, 3)
    print(json.dumps(row))
    return 0


class _HostPeak(threading.Thread):
    """The most memory of this process that is not pages of files, of many looks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            held = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
            self.bytes = max(self.bytes, 1024 * held)


def _work(stage: str, model: str, folder: Path, calibrate: dict[str, Any]) -> Any:
    """What a stage does, with everything that it imports imported."""
    from trimtab.components.calibration import work as calibration
    from trimtab.components.pruning import work as pruning
    from trimtab.components.quantization import work as quantization
    from trimtab.components.quantization.mixed import sensitivity
    from trimtab.components.validation.integrity import gate
    from trimtab.recipe import MIXED_FORMATS, Engine
    from trimtab.runtime.checkpoint import model_files
    from trimtab.runtime.engines.torch_engine import TorchEngine

    measured, scratch = str(folder / "calibrate"), str(folder / f"{stage}-scratch")
    output = folder / stage
    output.mkdir(parents=True, exist_ok=True)
    parameters = {"format": stage.partition(",")[0], "group_size": 64}
    if "at once" in stage:
        parameters["sequential"] = False

    def whole() -> dict[str, float]:
        started = time.perf_counter()
        loaded, _ = model_files.load_for_measuring(Path(model))
        synchronize()
        taken = time.perf_counter() - started
        tokens = torch.randint(3, 256, (calibrate["samples"], calibrate["length"]))
        calibration.whole(loaded, tokens)
        return {"load_seconds": round(taken, 2)}

    def score() -> dict[str, float]:
        engine = TorchEngine(folder / "int4_gptq", Engine(backend="torch"))
        tokens = load_file(folder / "calibrate" / "tokens.safetensors")["tokens"].long()[:8]
        return {"nll": sum(engine.nll(tokens)) / len(tokens)}

    def inspect() -> dict[str, Any]:
        form = stage.removeprefix("integrity of ")
        own = {"format": form, "group_size": 64}
        return {"told": gate.inspect(str(folder / form), model, str(output), scratch, own, measured)}

    if stage == "whole":
        return whole
    if stage.startswith("score"):
        return score
    if stage.startswith("integrity"):
        return inspect
    if stage == "calibrate":
        return lambda: calibration.calibrate(model, str(output), scratch, calibrate)
    if stage == "sensitivity":
        scored = {"formats": list(MIXED_FORMATS), "group_size": 64}
        return lambda: sensitivity.measure(model, measured, str(output), scratch, scored)
    if stage == "sparsegpt":
        settings = {"method": "sparsegpt", "pattern": "2:4"}
        return lambda: pruning.prune(model, measured, str(output), scratch, settings)
    return lambda: quantization.quantize(model, measured, None, str(output), scratch, parameters)


def _compared(first: Path, second: Path) -> dict[str, float]:
    """How far what was made under two caps is apart: the largest relative difference of statistics, and of exports the
    share of bytes that differ."""
    found: dict[str, float] = {}
    one, other = (folder / "calibrate" / "statistics.safetensors" for folder in (first, second))
    if one.is_file() and other.is_file():
        left, right = load_file(one), load_file(other)
        apart = (float((right[n] - t).abs().max() / t.abs().max().clamp_min(1e-30)) for n, t in left.items())
        found["statistics"] = max(apart)
    for path in sorted(second.glob("*/*.safetensors")):
        twin = first / path.relative_to(second)
        if path.parent.name in ("calibrate",) or not twin.is_file():
            continue
        left, right = load_file(twin), load_file(path)
        bits = [(left[n].view(torch.uint8) != t.view(torch.uint8)).float().sum() for n, t in right.items() if t.dim()]
        share = float(sum(bits)) / max(1, sum(t.nbytes for t in right.values()))
        found[path.parent.name] = max(found.get(path.parent.name, 0.0), share)
    return found


def _attempt(
    form: str, model: Path, calibrate: dict[str, Any], options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Seconds of a run that tries one recipe, and of its stages, as its log tells them."""
    folder = scratch / f"attempt-{form}"
    folder.mkdir()
    recipe = {"name": form, "quantize": {"format": form, "group_size": 64}, "calibrate": calibrate}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "trimtab", "run", "--model", str(model), "--recipe", str(folder / "recipe.yaml")]
    command += ["--store", str(scratch / "store"), "--target", options.target, "--max-attempts", "1"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "exit_code": done.returncode}
    row["last"] = ((done.stderr if done.returncode else done.stdout).strip().splitlines() or [""])[-1]
    texts = [path.read_text() for path in folder.glob("trimtab-runs/*/events.jsonl")]
    told = [json.loads(line) for text in texts for line in text.splitlines()]
    begun = told[0]["time"] if told else 0.0
    row["events"] = [[round(event["time"] - begun, 1), event["stage"], event["text"]] for event in told]
    log(f"attempt {form}: {row}")
    return row


if __name__ == "__main__":
    sys.exit(main())
