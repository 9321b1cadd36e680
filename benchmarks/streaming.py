"""Quantizing an 8-billion-parameter model on a small machine: seconds, peak memory, and what a kill costs.

Run: python benchmarks/streaming.py [--quick] [--folder FOLDER]
The model has the shape of Llama 3.1 8B and random weights: 16 GB of BF16, in files as the hub has them. fp8 adds
9 GB to it, int4_rtn 6 GB; they are removed when they have been measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_model import EIGHT_BILLION, random_model

from trimtab.base import child, progress
from trimtab.base.errors import StageError

WORK = "trimtab.components.quantization.work:quantize"
FORMATS = {"fp8": {"format": "fp8", "scale_search": "max"}, "int4_rtn": {"format": "int4_rtn", "group_size": 128}}
#: Two blocks of a quarter of the width.
QUARTER = {**EIGHT_BILLION, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2,
           "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks of a quarter of the width, in a minute")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the full width (32)")
    parser.add_argument("--folder", type=Path, help="an empty folder for the model, which stays there")
    arguments = parser.parse_args()
    shape = QUARTER if arguments.quick else {**EIGHT_BILLION, "num_hidden_layers": arguments.blocks}
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if any(arguments.folder.iterdir()):
            parser.error(f"--folder: '{arguments.folder}' is not empty; write a new folder")
        print(json.dumps(measure(arguments.folder, shape)))
        return 0
    with tempfile.TemporaryDirectory(prefix="trimtab-streaming-") as folder:
        print(json.dumps(measure(Path(folder), shape)))
    return 0


def measure(folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """Makes the model, quantizes it, prints the tables and returns their figures."""
    model, statistics = folder / "model", folder / "statistics"
    _apart(random_model, model, shape)
    _apart(write_statistics, model, statistics)
    source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print(f"{source / 1e9:.2f} GB of BF16 in {len(list(model.glob('*.safetensors')))} files")
    print(f"{'format':<10}{'seconds':>9}{'GB/s':>8}{'peak GiB':>10}{'bytes out':>16}")
    figures: dict[str, Any] = {"source_bytes": source}
    for name, settings in FORMATS.items():
        run = Run(folder / name, model, statistics if name == "fp8" else None, settings)
        done = run.finish()
        figures[name] = {
            "seconds": round(done.seconds, 1),
            "gb_per_second": round(source / done.seconds / 1e9, 3),
            "peak_gib": round(done.peak_memory_bytes / 2**30, 2),
            "bytes": done.value["bytes"],
        }
        print("{:<10}{seconds:>9}{gb_per_second:>8}{peak_gib:>10}{bytes:>16,}".format(name, **figures[name]))
        if name == "fp8":
            expected, shards = run.checksums(), len(run.made())
        shutil.rmtree(run.folder)
    figures["killed"] = _killed(Run(folder / "killed", model, statistics, FORMATS["fp8"]), shards, expected)
    shutil.rmtree(folder / "killed")
    print(
        "fp8 killed after {finished} of {shards} shards: {made_again} of these made again, {made} made by the resumed "
        "run in {seconds} s; all files the same: {same}".format(**figures["killed"])
    )
    return figures


@dataclass(frozen=True)
class Run:
    """Quantizes the model in processes of their own; a second one goes on where a killed one was."""

    folder: Path
    model: Path
    statistics: Path | None
    settings: dict[str, Any]

    def _arguments(self, attempt: str) -> dict[str, Any]:
        output, events = self.folder / "output", self.folder / f"{attempt}.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        os.environ[progress.ENVIRONMENT] = str(events)
        statistics = self.statistics and str(self.statistics)
        trees = {"checkpoint": str(self.model), "calibration": statistics, "sensitivity": None}
        return {**trees, "output": str(output), "scratch": str(self.folder / "scratch"), "parameters": self.settings}

    def finish(self) -> child.Done:
        """Quantizes to the end."""
        return child.call(WORK, **self._arguments("last"))

    def kill(self, when: Callable[[], bool]) -> None:
        """Quantizes until the condition holds, and sends SIGKILL."""
        process = multiprocessing.get_context("spawn").Process(target=_quantize, kwargs=self._arguments("first"))
        process.start()
        while process.is_alive() and not when():
            time.sleep(0.002)
        process.kill()
        process.join()
        if process.exitcode != -9:
            raise StageError(f"the run ended by itself, with exit code {process.exitcode}, before it was killed")

    def finished(self) -> set[int]:
        """The numbers of the shards that wait in the scratch folder."""
        return {int(path.stem.rpartition("-")[2]) for path in self.folder.glob("scratch/shards/*.safetensors")}

    def made(self) -> set[int]:
        """The numbers of the shards that `finish` worked on."""
        events = (self.folder / "last.jsonl").read_text(encoding="utf-8")
        return {int(number) for number in re.findall(r"quantizing shard (\d+) of", events)}

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of the export."""
        found = {}
        for path in sorted((self.folder / "output").iterdir()):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def _killed(run: Run, shards: int, expected: dict[str, str]) -> dict[str, Any]:
    run.kill(lambda: len(run.finished()) >= shards // 2)
    before = run.finished()
    done = run.finish()
    return {
        "shards": shards,
        "finished": len(before),
        "made": len(run.made()),
        "made_again": len(run.made() & before),
        "seconds": round(done.seconds, 1),
        "same": run.checksums() == expected,
    }


def _quantize(**arguments: Any) -> None:
    from trimtab.components.quantization import work

    work.quantize(**arguments)


def _apart(function: Callable[..., object], *arguments: Any) -> None:
    """Runs a function in a process of its own: what it holds would count in the peak of processes started later."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise StageError(f"{function.__name__} ended with exit code {process.exitcode}")


def write_statistics(model: Path, folder: Path) -> None:
    """Writes what a calibration pass would have measured, at random, bound to the model."""
    import torch

    from trimtab.model.facts import inspect
    from trimtab.runtime.measure import measurements

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    measured = {}
    for layer in inspect(model).linears:
        moment = torch.rand(layer.in_features, generator=generator)
        measured |= {f"{layer.name}.second_moment": moment, f"{layer.name}.amax": 8 * moment.sqrt()}
    measurements.write(folder, model, "statistics", measured)


if __name__ == "__main__":
    sys.exit(main())
