"""What each format costs in quality, beside plain ModelOpt with the same calibration tokens.

Run: python benchmarks/quality.py --model FOLDER [--text FILE] [--blimp FOLDER] [--seeds 3] [--quick]

A seed draws the calibration windows. With --text, the first 80 % of the file's lines calibrate and the last 20 %
measure perplexity; without it, trimtab's own texts do. --blimp is a folder of BLiMP's JSONL files. Every number is
measured on a reloaded export. The last line is one JSON object.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

from trimtab.components.calibration import grams
from trimtab.components.calibration.work import calibrate
from trimtab.components.quantization import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.recipe import MIXED_FORMATS, Engine, Quantization
from trimtab.runtime import checkpoint, text
from trimtab.runtime.engine import TorchEngine

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face model folder")
    parser.add_argument("--text", type=Path, help="a text file; trimtab's own when absent")
    parser.add_argument("--blimp", type=Path, help="a folder of BLiMP's .jsonl files")
    parser.add_argument("--pairs", type=int, default=94, help="pairs of each BLiMP file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=48, help="test windows of 512 tokens, at most")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="one seed, three formats, little text")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.samples, options.windows, options.pairs = 1, 2, 2, 5
        options.formats = list(QUICK)
    with tempfile.TemporaryDirectory() as folder:
        figures = _Benchmark(options, Path(folder)).run()
    print(json.dumps(figures))
    return 0


class _Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.calibration, self.test = _texts(options.text, folder)
        self.sentences = _pairs(options.blimp, options.pairs) if options.blimp else []

    def run(self) -> dict[str, Any]:
        dense = self._measure(self.options.model)
        print(f"{'format':<22}{'by':<10}{'seed':>5}{'perplexity':>12}{'BLiMP':>9}{'seconds':>9}")
        self._print("dense", "", "", dense, 0.0)
        rows: dict[str, dict[str, list[dict]]] = {name: {"ours": [], "plain": []} for name in self.options.formats}
        for seed in range(self.options.first_seed, self.options.first_seed + self.options.seeds):
            trees = self._calibrate(seed)
            plain: dict[str, dict] = {}
            for name in self.options.formats:
                preset = FORMATS[name][1]
                if name in SEEDLESS and rows[name]["ours"]:
                    continue
                rows[name]["ours"].append(self._row(name, "ours", seed, partial(self._ours, name, trees)))
                if preset and preset not in plain and (torch.cuda.is_available() or preset not in CUDA_ONLY):
                    plain[preset] = self._row(name, "plain", seed, partial(self._plain, preset, trees[0]))
                if preset in plain:
                    rows[name]["plain"].append(plain[preset])
        return {"dense": _short(dense), "formats": {n: self._summary(n, row) for n, row in rows.items()}}

    def _calibrate(self, seed: int) -> tuple[Path, Path, Path]:
        """The measurements of one seed: statistics, and Gram matrices and sensitivity where a format needs them."""
        wanted = [_settings(name) for name in self.options.formats]
        folders = tuple(self.folder / f"{what}-{seed}" for what in ("calibration", "gram", "sensitivity"))
        for folder in folders:
            folder.mkdir()
        model, (first, second, third) = str(self.options.model), map(str, folders)
        settings = {"samples": self.options.samples, "length": 512, "seed": seed, "text": self.calibration}
        calibrate(model, first, "", settings)
        if any(settings.needs_grams for settings in wanted):
            grams.measure(model, first, second, "", {})
        if any(settings.needs_sensitivity for settings in wanted):
            sensitivity.measure(model, first, third, "", {"formats": list(MIXED_FORMATS), "group_size": GROUP})
        return folders

    def _row(self, name: str, by: str, seed: int, make: Callable[[], Path]) -> dict[str, Any]:
        started = time.perf_counter()
        folder = make()
        seconds = time.perf_counter() - started
        found = {**self._measure(folder), "seconds": seconds}
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
        model, tokenizer = checkpoint.load(self.options.model, torch.float32)
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

    def _measure(self, folder: Path) -> dict[str, Any]:
        engine = TorchEngine(folder, Engine())
        windows = text.windows(engine.tokenizer, self.test, 512, self.options.windows)
        nll = engine.nll(windows)
        found: dict[str, Any] = {"perplexity": math.exp(sum(nll) / (windows.numel() - len(windows)))}
        if self.sentences:
            start = [engine.tokenizer.eos_token_id]
            tokens = [engine.tokenizer(s, add_special_tokens=False).input_ids for s in self.sentences]
            scores = [score for score, _ in engine.loglikelihood([(start, t) for t in tokens])]
            found["right"] = [float(good > bad) for good, bad in zip(scores[::2], scores[1::2], strict=True)]
        return found

    def _summary(self, name: str, row: dict[str, list[dict]]) -> dict[str, Any]:
        ours, plain = (statistics.fmean(r["perplexity"] for r in row[by]) if row[by] else None for by in row)
        found: dict[str, Any] = {"perplexity": ours, "plain_perplexity": plain}
        found["seeds"] = [round(r["perplexity"], 3) for r in row["ours"]]
        if plain:
            found["perplexity_over_plain"] = ours / plain
        if self.sentences:
            found["blimp"] = statistics.fmean(statistics.fmean(r["right"]) for r in row["ours"])
        if self.sentences and row["plain"]:
            found["plain_blimp"] = statistics.fmean(statistics.fmean(r["right"]) for r in row["plain"])
            found["blimp_difference"] = _paired(row["ours"], row["plain"])
        told = " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{name}: {told}")
        return found

    def _print(self, name: str, by: str, seed: int | str, found: dict[str, Any], seconds: float) -> None:
        blimp = f"{statistics.fmean(found['right']):>9.4f}" if self.sentences else " " * 9
        print(f"{name:<22}{by:<10}{seed:>5}{found['perplexity']:>12.3f}{blimp}{seconds:>9.1f}", flush=True)


def _settings(name: str) -> Quantization:
    return Quantization.model_validate({"format": name, "group_size": GROUP, **FORMATS[name][0]})


def _short(found: dict[str, Any]) -> dict[str, float]:
    right = found.get("right")
    return {"perplexity": found["perplexity"], **({"blimp": statistics.fmean(right)} if right else {})}


def _texts(path: Path | None, folder: Path) -> tuple[str, str]:
    """Returns the calibration text as a recipe names it, and the test text itself."""
    if path is None:
        heldout = ("trimtab.components.validation.suite", "heldout.txt")
        return "builtin", text.read_text("builtin", heldout)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(0.8 * len(lines))
    (folder / "calibration.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    return str(folder / "calibration.txt"), "".join(lines[cut:])


def _pairs(folder: Path, count: int) -> list[str]:
    """The first pairs of each file: a good sentence, then its bad twin, and so on."""
    sentences = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            pair = json.loads(line)
            sentences += [pair["sentence_good"], pair["sentence_bad"]]
    return sentences


def _paired(ours: list[dict], plain: list[dict]) -> list[float]:
    """Accuracy of ours minus plain's: the mean over seeds and pairs, and its 95 % interval over pairs."""
    pairs = zip(*(r["right"] for r in ours), strict=True), zip(*(r["right"] for r in plain), strict=True)
    differences = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(*pairs, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return [round(x, 4) for x in (mean, mean - half, mean + half)]


if __name__ == "__main__":
    sys.exit(main())
