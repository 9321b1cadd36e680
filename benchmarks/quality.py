"""What each format costs in quality, beside plain ModelOpt with the same calibration tokens.

Run: python benchmarks/quality.py --model FOLDER [--text FILE] [--blimp FOLDER] [--seeds 3] [--quick]

A seed draws the calibration windows. With --text, the first 80 % of the file's lines calibrate and the last 20 %
measure perplexity; without it, trimtab's own texts do. --blimp is a folder of BLiMP's JSONL files. Every number is
measured on a reloaded export. The last line is one JSON object.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import modelopt.torch.quantization as mtq
import torch
from measuring import Measuring, blimp, columns, paired, short
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

from trimtab.components.calibration import grams
from trimtab.components.calibration.work import calibrate
from trimtab.components.quantization.mixed import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.recipe import MIXED_FORMATS, Quantization
from trimtab.runtime.checkpoint import model_files

GROUP = 64
#: Row -> the recipe's quantization, and ModelOpt's preset to set beside it, if there is one.
FORMATS = {
    "fp8": ({}, "FP8_DEFAULT_CFG"),
    "fp8, searched scales": ({"format": "fp8", "scale_search": "mse"}, "FP8_DEFAULT_CFG"),
    "fp8_per_channel": ({}, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "int8_wo": ({}, "INT8_WEIGHT_ONLY_CFG"),
    "int8_sq": ({}, "INT8_SMOOTHQUANT_CFG"),
    "int4_rtn": ({}, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "int4_awq": ({}, "INT4_AWQ_CFG"),
    "int4_gptq": ({}, "INT4_AWQ_CFG"),
    "mixed, 5.0 bits": ({"format": "mixed", "effective_bits": 5.0}, "INT4_AWQ_CFG"),
    "w4a8_awq": ({}, "W4A8_AWQ_BETA_CFG"),
    "nvfp4": ({}, "NVFP4_DEFAULT_CFG"),
    "mxfp4": ({}, None),  # ModelOpt's own export lacks the scales of its FP8 inputs
}
#: ModelOpt's FP4 needs a GPU.
CUDA_ONLY = ("NVFP4_DEFAULT_CFG",)
#: They read no calibration data, so one seed tells all.
SEEDLESS = ("fp8_per_channel", "int8_wo", "int4_rtn")
QUICK = ("int8_sq", "int4_rtn")


class _Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.measuring = Measuring(options, folder)

    def run(self) -> dict[str, Any]:
        dense = self.measuring.measure(self.options.model)
        print(f"{'format':<22}{'by':<10}{'seed':>5}{'perplexity':>12}{'BLiMP':>9}{'seconds':>9}")
        self._print("dense", "", "", dense, 0.0)
        rows: dict[str, dict[str, list[dict]]] = {name: {"ours": [], "plain": []} for name in self.options.rows}
        for seed in self.measuring.seeds:
            trees = self._calibrate(seed)
            plain: dict[str, dict] = {}
            for name in self.options.rows:
                preset = FORMATS[name][1]
                if name in SEEDLESS and rows[name]["ours"]:
                    continue
                rows[name]["ours"].append(self._row(name, "ours", seed, partial(self._ours, name, trees)))
                if preset and preset not in plain and (torch.cuda.is_available() or preset not in CUDA_ONLY):
                    plain[preset] = self._row(name, "plain", seed, partial(self._plain, preset, trees[0]))
                if preset in plain:
                    rows[name]["plain"].append(plain[preset])
        return {"dense": short(dense), "formats": {n: self._summary(n, row) for n, row in rows.items()}}

    def _calibrate(self, seed: int) -> tuple[Path, Path, Path]:
        """The measurements of one seed: statistics, and Gram matrices and sensitivity where a format needs them."""
        wanted = [_settings(name) for name in self.options.rows]
        folders = tuple(self.folder / f"{what}-{seed}" for what in ("calibration", "gram", "sensitivity"))
        for folder in folders:
            folder.mkdir()
        model, (first, second, third) = str(self.options.model), map(str, folders)
        calibrate(model, first, "", self.measuring.calibration(seed))
        if any(settings.needs_grams for settings in wanted):
            grams.measure(model, first, second, "", {})
        if any(settings.needs_sensitivity for settings in wanted):
            sensitivity.measure(model, first, third, "", {"formats": list(MIXED_FORMATS), "group_size": GROUP})
        return folders

    def _row(self, name: str, by: str, seed: int, make: Callable[[], Path]) -> dict[str, Any]:
        started = time.perf_counter()
        folder = make()
        seconds = time.perf_counter() - started
        found = {**self.measuring.measure(folder), "seconds": seconds}
        self._print(name, by, seed, found, seconds)
        return found

    def _ours(self, name: str, trees: tuple[Path, Path, Path]) -> Path:
        settings = _settings(name)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        calibration, gram, harm = map(str, trees)
        quantize(
            str(self.options.model),
            calibration if settings.needs_statistics else None,
            gram if settings.needs_grams else None,
            harm if settings.needs_sensitivity else None,
            str(folder),
            str(folder / "scratch"),
            settings.model_dump(mode="json"),
        )
        return folder

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

    def _summary(self, name: str, row: dict[str, list[dict]]) -> dict[str, Any]:
        ours, plain = (statistics.fmean(r["perplexity"] for r in row[by]) if row[by] else None for by in row)
        found: dict[str, Any] = {"perplexity": ours, "plain_perplexity": plain}
        found["seeds"] = [round(r["perplexity"], 3) for r in row["ours"]]
        if plain:
            found["perplexity_over_plain"] = ours / plain
        if self.measuring.sentences:
            found["blimp"] = blimp(row["ours"])
        if self.measuring.sentences and row["plain"]:
            found["plain_blimp"] = blimp(row["plain"])
            found["blimp_difference"] = paired(row["ours"], row["plain"])
        told = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{name}: {told}")
        return found

    def _print(self, name: str, by: str, seed: int | str, found: dict[str, Any], seconds: float) -> None:
        print(f"{name:<22}{by:<10}{seed:>5}{columns(found, seconds)}", flush=True)


def _settings(name: str) -> Quantization:
    return Quantization.model_validate({"format": name, "group_size": GROUP, **FORMATS[name][0]})


if __name__ == "__main__":
    sys.exit(measuring.main(__doc__, "formats", FORMATS, QUICK, _Benchmark))
