"""What pruning costs in quality.

Run: python benchmarks/pruning.py --model FOLDER [--text FILE] [--blimp FOLDER] [--seeds 3] [--rows NAME ...] [--quick]

A seed draws the calibration windows. With --text, the first 80 % of the file's lines calibrate and the last 20 %
measure perplexity; without it, trimtab's own texts do. --blimp is a folder of BLiMP's JSONL files. Every number is
measured on a reloaded checkpoint; `gap` is the logarithm of its perplexity over the dense one's. The last line is one
JSON object.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
from measuring import Measuring, blimp, short

from trimtab.components.calibration.work import calibrate
from trimtab.components.pruning.work import prune

#: Row -> the recipe's `prune`.
ROWS: dict[str, dict[str, Any]] = {
    f"{method} {pattern or '50 %'}": {"method": method, **({"pattern": pattern} if pattern else {"sparsity": 0.5})}
    for method in ("magnitude", "wanda", "sparsegpt")
    for pattern in (None, "4:8", "2:4")
}
#: They read no calibration data, so one seed tells all.
SEEDLESS = tuple(name for name in ROWS if name.startswith("magnitude"))
QUICK = ("magnitude 50 %", "wanda 50 %")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_arguments(parser)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="one seed, two rows, little text")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.samples, options.windows, options.pairs = 1, 2, 2, 5
        options.rows = list(QUICK)
    with tempfile.TemporaryDirectory() as folder:
        figures = _Benchmark(options, Path(folder)).run()
    print(json.dumps(figures))
    return 0


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
                    found.append(self._row(name, calibration, dense))
                    self._print(name, seed, found[-1])
        return {"dense": short(dense), "rows": {name: _summary(found) for name, found in rows.items()}}

    def _row(self, name: str, calibration: Path, dense: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            pruned = Path(folder) / "pruned"
            pruned.mkdir()
            started = time.perf_counter()
            prune(str(self.options.model), str(calibration), str(pruned), f"{folder}/scratch", ROWS[name])
            seconds = time.perf_counter() - started
            found = self.measuring.measure(pruned)
        return {**found, "gap": math.log(found["perplexity"] / dense["perplexity"]), "seconds": seconds}

    def _print(self, name: str, seed: int | str, found: dict[str, Any]) -> None:
        right = f"{blimp([found]):>9.4f}" if "right" in found else " " * 9
        numbers = f"{found['perplexity']:>12.3f}{found['gap']:>8.3f}{right}{found['seconds']:>9.1f}"
        print(f"{name:<28}{seed:>5}{numbers}", flush=True)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and each seed's perplexity."""
    found = {what: statistics.fmean(row[what] for row in rows) for what in ("perplexity", "gap", "seconds")}
    if "right" in rows[0]:
        found["blimp"] = blimp(rows)
    return {**found, "seeds": [round(row["perplexity"], 3) for row in rows]}


if __name__ == "__main__":
    sys.exit(main())
