"""What each format costs in quality, beside plain ModelOpt with the same calibration tokens.

Run: python benchmarks/quality.py --model FOLDER [--text FILE] [--blimp FOLDER] [--seeds 3] [--jobs 3] [--quick]
    [--others PYTHON] [--no-plain]

With --jobs, exports are made and scored beside each other, each in a process: on a GPU most of the time goes into
launching small kernels, and into what ModelOpt does on the CPU; seconds are then those beside the others. A seed draws
the calibration windows. With --text, the first 80 % of the file's lines calibrate and the last 20 % measure perplexity;
without it, trimtab's own texts do. --blimp is a folder of BLiMP's JSONL files. Every number is measured on a reloaded
export; where the integrity gate refuses one of ours, `refused` says why. From --samples 64 on, GPTQ rounds in order;
the rows "at once" do not. --others adds what llm-compressor and AutoRound make of the same tokens, by the Python of an
environment of theirs (see others.py), in their own emulation.
--no-plain leaves out plain ModelOpt, whose AWQ takes longer than all else.
The last line is one JSON object.
"""

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import modelopt.torch.quantization as mtq
import torch
from machine import log
from measuring import Measuring, blimp, columns, paired, short
from modelopt.torch.export import export_hf_checkpoint
from others import TOOLS
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.components.calibration.work import calibrate
from trimtab.components.quantization.mixed import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.components.validation.integrity import gate
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import model_files

GROUP = 64
_MIX = {"format": "mixed_gpu"}
#: Row -> the recipe's quantization, and ModelOpt's preset to set beside it, if there is one.
FORMATS = {
    "fp8": ({}, "FP8_DEFAULT_CFG"),
    "fp8, searched scales": ({"format": "fp8", "scale_search": "mse"}, "FP8_DEFAULT_CFG"),
    "fp8_gptq": ({}, "FP8_DEFAULT_CFG"),
    "fp8_gptq, at once": ({"format": "fp8_gptq", "sequential": False}, "FP8_DEFAULT_CFG"),
    "fp8_per_channel": ({}, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "int8_wo": ({}, "INT8_WEIGHT_ONLY_CFG"),
    "int8_sq": ({}, "INT8_SMOOTHQUANT_CFG"),
    "int4_rtn": ({}, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "int4_awq": ({}, "INT4_AWQ_CFG"),
    "int4_gptq": ({}, "INT4_AWQ_CFG"),
    "int4_gptq, at once": ({"format": "int4_gptq", "sequential": False}, "INT4_AWQ_CFG"),
    "int4_gptq, asymmetry 0": ({"format": "int4_gptq", "sequential": True, "asymmetry": 0.0}, "INT4_AWQ_CFG"),
    "int4_gptq, no sweeps": ({"format": "int4_gptq", "sweeps": 0}, "INT4_AWQ_CFG"),
    "int4_gptq, asymmetry 1": ({"format": "int4_gptq", "sequential": True, "asymmetry": 1.0}, "INT4_AWQ_CFG"),
    "mixed, 5.0 bits": ({"format": "mixed", "effective_bits": 5.0}, "INT4_AWQ_CFG"),
    "mixed_gpu, 5.0 bits": ({**_MIX, "effective_bits": 5.0}, None),
    "mixed_gpu, 5.5 bits": ({**_MIX, "effective_bits": 5.5}, None),
    "mixed_gpu, 6.0 bits": ({**_MIX, "effective_bits": 6.0}, None),
    # the time of 206 tokens a step, where 16 bits are read and multiplied in as much
    "mixed_gpu, 0.7 of the time": ({**_MIX, "effective_bits": 6.0, "max_time": 0.7, "step_tokens": 206}, None),
    "w4a8_awq": ({}, "W4A8_AWQ_BETA_CFG"),
    "nvfp4": ({}, "NVFP4_DEFAULT_CFG"),
    "nvfp4, to nearest": ({"format": "nvfp4", "method": "nearest"}, "NVFP4_DEFAULT_CFG"),
    "nvfp4, at once": ({"format": "nvfp4", "sequential": False}, "NVFP4_DEFAULT_CFG"),
    "nvfp4_wo": ({}, "W4A16_NVFP4_CFG"),
    "nvfp4_wo, at once": ({"format": "nvfp4_wo", "sequential": False}, "W4A16_NVFP4_CFG"),
    "nvfp4_wo, to nearest": ({"format": "nvfp4_wo", "method": "nearest"}, "W4A16_NVFP4_CFG"),
    "mxfp4": ({}, None),  # ModelOpt's own export lacks the scales of its FP8 inputs
    "mxfp4_wo": ({}, None),  # which has no name for it
    "mxfp4_wo, at once": ({"format": "mxfp4_wo", "sequential": False}, None),
    "mxfp4_wo, to nearest": ({"format": "mxfp4_wo", "method": "nearest"}, None),
}
#: Row -> what others.py calls its format.
OTHERS = {"int4_gptq": "int4", "nvfp4": "nvfp4", "nvfp4_wo": "nvfp4_wo"}
#: ModelOpt's FP4 needs a GPU.
CUDA_ONLY = ("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG")
#: They read no calibration data, so one seed tells all.
SEEDLESS = ("fp8_per_channel", "int8_wo", "int4_rtn", "nvfp4_wo, to nearest", "mxfp4_wo, to nearest")
QUICK = ("int8_sq", "int4_rtn")


class _Benchmark:
    """Args: options; the folder that all processes of one run share."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.measuring = Measuring(options, folder)

    def run(self) -> dict[str, Any]:
        print(f"{'format':<28}{'by':<16}{'seed':>5}{'perplexity':>12}{'BLiMP':>9}{'seconds':>9}", flush=True)
        seeds, gpu = self.measuring.seeds, torch.cuda.is_available()
        tasks: list[tuple[str, str, int]] = []
        for seed in seeds:
            presets = dict.fromkeys(FORMATS[name][1] for name in self.options.rows)
            plain = [preset for preset in presets if preset and (gpu or preset not in CUDA_ONLY)]
            plain = [] if self.options.no_plain else plain
            ours = [name for name in self.options.rows if name not in SEEDLESS or seed == seeds[0]]
            tasks += [("plain", preset, seed) for preset in plain] + [("ours", name, seed) for name in ours]
            tools = TOOLS if self.options.others else ()
            tasks += [(tool, name, seed) for tool in tools for name in self.options.rows if name in OTHERS]
        tasks.sort(key=lambda task: task[1] != "INT4_AWQ_CFG")  # which takes longest, on the CPU
        if self.options.jobs > 1:
            with ProcessPoolExecutor(self.options.jobs, multiprocessing.get_context("spawn")) as pool:
                done = partial(pool.map, partial(_in_process, self.options, self.folder))
                [*done(["calibrate"] * len(seeds), [""] * len(seeds), seeds)]
                dense, *found = done(*zip(("dense", "", ""), *tasks, strict=True))
        else:
            for seed in seeds:
                self.calibrate(seed)
            dense, *found = (self.row(*task) for task in (("dense", "", ""), *tasks))
        by_task = dict(zip(tasks, found, strict=True))
        rows = {}
        for name in self.options.rows:
            plain = [by_task.get(("plain", FORMATS[name][1], seed)) for seed in seeds]
            ours = [by_task.get(("ours", name, seed)) for seed in seeds]
            rows[name] = {"ours": [*filter(None, ours)], "plain": [*filter(None, plain)]}
            rows[name] |= {tool: [by_task[task] for seed in seeds if (task := (tool, name, seed)) in by_task]
                           for tool in TOOLS}  # fmt: skip
        return {"dense": short(dense), "formats": {n: self._summary(n, row) for n, row in rows.items()}}

    def trees(self, seed: int) -> list[Path]:
        """The measurements of one seed: statistics and sensitivity."""
        return [self.folder / f"{what}-{seed}" for what in ("calibration", "sensitivity")]

    def calibrate(self, seed: int) -> None:
        """Measures what the formats need."""
        wanted, folders = [_settings(name) for name in self.options.rows], self.trees(seed)
        for folder in folders:
            folder.mkdir()
        model, (first, second) = str(self.options.model), map(str, folders)
        calibrate(model, first, "", self.measuring.calibration(seed))
        forms = dict.fromkeys(f for s in wanted if s.needs_sensitivity for f in s.layer_formats)
        if forms:
            sensitivity.measure(model, first, second, "", {"formats": list(forms), "group_size": GROUP})

    def row(self, by: str, name: str, seed: int | str) -> dict[str, Any]:
        """Makes and scores one export: `ours` by a row's name, `plain` by ModelOpt's preset, the `dense` model, or what
        one of `TOOLS` makes for a row, without BLiMP."""
        started = time.perf_counter()
        if by in TOOLS:
            return self._other(by, name, int(seed))
        trees = [] if by == "dense" else self.trees(seed)
        folder = self.options.model
        if trees:
            folder = self._ours(name, trees) if by == "ours" else self._plain(name, trees[0])
        seconds = time.perf_counter() - started
        refused = self._refused(name, folder, trees[0]) if by == "ours" else None
        found = {**self.measuring.measure(folder), "seconds": seconds, "refused": refused}
        label = next((row for row in self.options.rows if FORMATS[row][1] == name), name) if by == "plain" else name
        print(f"{label:<28}{by:<16}{seed:>5}{columns(found, seconds)}", flush=True)
        return found

    def _ours(self, name: str, trees: list[Path]) -> Path:
        settings = _settings(name)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        calibration, harm = map(str, trees)
        quantize(
            str(self.options.model),
            calibration if settings.needs_statistics else None,
            harm if settings.needs_sensitivity else None,
            str(folder),
            str(folder / "scratch"),
            settings.model_dump(mode="json"),
        )
        return folder

    def _refused(self, name: str, export: Path, calibration: Path) -> str | None:
        """What the integrity gate says of an export that it refuses."""
        settings, seen = _settings(name), calibration if _settings(name).needs_statistics else None
        told = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            gate.inspect(str(export), str(self.options.model), str(told), "", settings.model_dump(mode="json"),
                         seen and str(seen))  # fmt: skip
        except Failure as reason:
            log(f"{name}: the gate refuses it: {reason}")
            return str(reason)
        return None

    def _plain(self, preset: str, calibration: Path) -> Path:
        """ModelOpt as its documentation has it, on the same tokens; in float32, as its export wants it on a CPU."""
        model, tokenizer = model_files.load(self.options.model, torch.float32)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokens = load_file(calibration / "tokens.safetensors")["tokens"].long().to(model.device)
        config = copy.deepcopy(getattr(mtq, preset))
        for entry in config["quant_cfg"]:
            blocks = entry["cfg"].get("block_sizes") if isinstance(entry.get("cfg"), dict) else None
            if blocks and blocks.get(-1) == 128:  # INT4's: a hidden size of 576 takes 64 and not 128
                blocks[-1] = GROUP

        def run(network: torch.nn.Module) -> None:
            for window in tokens:
                network(window[None], logits_to_keep=1)

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with torch.inference_mode():
            mtq.quantize(model, config, run)
            export_hf_checkpoint(model, export_dir=folder)
        tokenizer.save_pretrained(folder)
        return folder

    def _other(self, tool: str, name: str, seed: int) -> dict[str, Any]:
        """What another tool makes of the same tokens, and the seconds it took."""
        tokens = Path(tempfile.mkdtemp(dir=self.folder)) / "tokens.safetensors"
        calibration = load_file(self.trees(seed)[0] / "tokens.safetensors")["tokens"].long()
        heldout = self.measuring.windows_of(model_files.load_tokenizer(self.options.model))
        save_file({"calibration": calibration, "heldout": heldout.contiguous()}, tokens)
        script, work = Path(__file__).with_name("others.py"), [self.options.model, tokens, tool, OTHERS[name]]
        command = [self.options.others, str(script), *map(str, work)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<28}{tool:<16}{seed:>5}{columns(found, found['seconds'])}", flush=True)
        return found

    def _summary(self, name: str, row: dict[str, list[dict]]) -> dict[str, Any]:
        means = {by: statistics.fmean(r["perplexity"] for r in row[by]) if row[by] else None for by in row}
        ours, plain = means["ours"], means["plain"]
        found: dict[str, Any] = {"perplexity": ours, "plain_perplexity": plain}
        found |= {f"{tool}_perplexity": means[tool] for tool in TOOLS if means[tool]}
        found["seeds"] = [round(r["perplexity"], 3) for r in row["ours"]]
        if plain:
            found["perplexity_over_plain"] = ours / plain
        if self.measuring.sentences:
            found["blimp"] = blimp(row["ours"])
        if self.measuring.sentences and row["plain"]:
            found["plain_blimp"] = blimp(row["plain"])
            found["blimp_difference"] = paired(row["ours"], row["plain"])
        found["seconds"] = [round(r["seconds"], 1) for r in row["ours"]]
        found |= {"refused": told} if (told := [*filter(None, (r["refused"] for r in row["ours"]))]) else {}
        told = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{name}: {told}")
        return found


def _in_process(options: argparse.Namespace, folder: Path, by: str, name: str, seed: int | str) -> dict | None:
    """One piece of work in a process of its own, which shares the cores with the others."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    benchmark = _Benchmark(options, folder)
    return benchmark.calibrate(seed) if by == "calibrate" else benchmark.row(by, name, seed)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="exports that are made and scored beside each other")
    parser.add_argument("--others", metavar="PYTHON", help="of an environment with llm-compressor and AutoRound")
    parser.add_argument("--no-plain", action="store_true", help="leave out what plain ModelOpt makes")


def _settings(name: str) -> Quantization:
    return Quantization.model_validate({"format": name, "group_size": GROUP, **FORMATS[name][0]})


if __name__ == "__main__":
    sys.exit(measuring.main(__doc__, "formats", FORMATS, QUICK, _Benchmark, _more))
