"""What pruning costs in quality.

Run: python benchmarks/pruning.py --model FOLDER [--text FILE] [--blimp FOLDER] [--seeds 3] [--rows NAME ...] [--quick]

A seed draws the calibration windows, and what a random row removes. With --text, the first 80 % of the file's lines
calibrate and the last 20 % measure perplexity; without it, trimtab's own texts do. --blimp is a folder of BLiMP's JSONL
files. Every number is measured on a reloaded checkpoint; `gap` is the logarithm of its perplexity over the dense one's.
Rows of one title have equal parameters. The last line is one JSON object.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import naive
import torch
from measuring import Measuring, blimp, columns, short
from pydantic import TypeAdapter

from trimtab.components.calibration.work import calibrate
from trimtab.components.pruning.structured import writing
from trimtab.components.pruning.work import prune
from trimtab.model import shapes
from trimtab.model.facts import inspect
from trimtab.recipe import Pruning
from trimtab.runtime.measure.measurements import Measurements

#: Row -> the recipe's `prune`.
ROWS: dict[str, dict[str, Any]] = {
    f"{method} {pattern or '50 %'}": {"method": method, **({"pattern": pattern} if pattern else {"sparsity": 0.5})}
    for method in ("magnitude", "wanda", "sparsegpt")
    for pattern in (None, "4:8", "2:4")
}
ROWS |= {
    f"{method} 50 % by sensitivity": {"method": method, "sparsity": 0.5, "allocation": "sensitivity"}
    for method in ("magnitude", "wanda", "sparsegpt")
}
#: Structured pruning and its naive peers at equal parameters: title -> the recipe's `prune`, and peer -> its function.
_DEPTH = {"last": naive.last_blocks, "random": naive.random_blocks}
_WIDTH = {"by magnitude": naive.magnitude_width, "random": naive.random_width}
STRUCTURED: dict[str, tuple[dict[str, Any], dict[str, Callable[..., writing.Left]]]] = {
    "4 blocks": ({"method": "depth", "blocks": 4}, _DEPTH),
    "4 blocks in a row": ({"method": "depth", "blocks": 4, "contiguous": True}, {}),
    "7 blocks": ({"method": "depth", "blocks": 7}, {}),
    "31 % FFN, as many as 7 blocks": ({"method": "width", "ffn": 0.31}, {}),
    "20 % FFN": ({"method": "width", "ffn": 0.2}, _WIDTH),
    "1 KV group": ({"method": "width", "kv_groups": 1}, _WIDTH),
    # a Llama's heads divide its hidden size, which nine do in no smaller size of whole multiples
    "1 KV group, 1/3 hidden": ({"method": "width", "kv_groups": 1, "hidden": 0.33}, _WIDTH),
}
ROWS |= {title: recipe for title, (recipe, _) in STRUCTURED.items()}
#: Row -> the recipe whose shapes it has, and how it comes by them.
NAIVE = {f"{title}, {peer}": (recipe, f) for title, (recipe, peers) in STRUCTURED.items() for peer, f in peers.items()}
ROWS |= {name: recipe for name, (recipe, _) in NAIVE.items()}
#: They read no calibration data, so one seed tells all.
SEEDLESS = ("magnitude 50 %", "magnitude 4:8", "magnitude 2:4") + tuple(n for n in NAIVE if not n.endswith("random"))
QUICK = ("magnitude 50 %", "wanda 50 %")


class _Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.measuring = Measuring(options, folder)

    def run(self) -> dict[str, Any]:
        dense = self.measuring.measure(self.options.model)
        print(f"{'row':<28}{'seed':>5}{'perplexity':>12}{'gap':>8}{'BLiMP':>9}{'seconds':>9}")
        self._print("dense", "", {**dense, "gap": 0.0, "seconds": 0.0})
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.options.rows}
        for seed in self.measuring.seeds:
            calibration = self.folder / f"calibration-{seed}"
            calibration.mkdir()
            calibrate(str(self.options.model), str(calibration), "", self.measuring.calibration(seed))
            for name, found in rows.items():
                if name not in SEEDLESS or not found:
                    found.append(self._row(name, seed, calibration, dense))
                    self._print(name, seed, found[-1])
        return {"dense": short(dense), "rows": {name: _summary(found) for name, found in rows.items()}}

    def _row(self, name: str, seed: int, calibration: Path, dense: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            pruned = Path(folder) / "pruned"
            pruned.mkdir()
            started = time.perf_counter()
            if name in NAIVE:
                self._prune_naively(name, seed, calibration, pruned, Path(folder) / "scratch")
            else:
                prune(str(self.options.model), str(calibration), str(pruned), f"{folder}/scratch", ROWS[name])
            seconds = time.perf_counter() - started
            found = self.measuring.measure(pruned)
        return {**found, "gap": math.log(found["perplexity"] / dense["perplexity"]), "seconds": seconds}

    def _prune_naively(self, name: str, seed: int, calibration: Path, folder: Path, scratch: Path) -> None:
        recipe, choose = NAIVE[name]
        source = self.options.model
        sizes = shapes.pruned(inspect(source), TypeAdapter(Pruning).validate_python(recipe))
        measured = Measurements(calibration, source, "calibration")
        writing.write(source, choose(source, sizes, measured, torch.Generator().manual_seed(seed)), folder, scratch)

    def _print(self, name: str, seed: int | str, found: dict[str, Any]) -> None:
        gap = f"{found['gap']:>8.3f}"
        print(f"{name:<28}{seed:>5}{columns(found, found['seconds'], gap)}", flush=True)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and each seed's perplexity."""
    found = {what: statistics.fmean(row[what] for row in rows) for what in ("perplexity", "gap", "seconds")}
    if "right" in rows[0]:
        found["blimp"] = blimp(rows)
    return {**found, "seeds": [round(row["perplexity"], 3) for row in rows]}


if __name__ == "__main__":
    sys.exit(measuring.main(__doc__, "rows", ROWS, QUICK, _Benchmark))
