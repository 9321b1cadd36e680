"""The integrity gate's comparison of an export with its source, beside reading both: the aim is 1.5 times as long.

Run: python benchmarks/integrity.py [--quick] [--format int4_rtn] [--folder FOLDER]
The model has the shape of Llama 3.1 8B and random weights, 16 GB in BF16. Layers are compared by weights and outputs,
for inputs drawn at random. Of two readings and two comparisons the faster counts, so both come from memory as far as
they fit into it. The last line is one JSON object, in seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_model import EIGHT_BILLION, random_model
from streaming import QUARTER

from trimtab import families
from trimtab.base import child
from trimtab.components.validation.integrity import weights
from trimtab.components.validation.integrity.folds import Folds
from trimtab.components.validation.integrity.reading import AHEAD, Stream
from trimtab.families import fusion
from trimtab.model.facts import inspect
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.model_files import weight_file_bytes
from trimtab.runtime.measure import measurements
from trimtab.runtime.measure.observe import SKETCH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks of a quarter of the width")
    parser.add_argument("--format", default="int4_rtn", help="one that needs no calibration")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-integrity-", dir=arguments.folder) as folder:
        shape = QUARTER if arguments.quick else EIGHT_BILLION
        print(json.dumps(measure(Path(folder), shape, arguments.format)))
    return 0


def measure(folder: Path, shape: dict[str, Any], form: str) -> dict[str, Any]:
    """Quantizes a random model, and returns the seconds of reading and of comparing it."""
    model, export = random_model(folder / "model", shape), folder / "export"
    export.mkdir()
    settings = {"format": form, "group_size": 128}
    trees = {"checkpoint": model, "calibration": None, "sensitivity": None, "output": export}
    named = {name: path and str(path) for name, path in trees.items()}
    child.call(
        "trimtab.components.quantization.work:quantize", **named, scratch=str(folder / "scratch"), parameters=settings
    )
    facts = inspect(model)
    groups = fusion.groups([layer.name for layer in facts.linears], facts.model_type)
    family, quantize = families.named(facts.model_type), Quantization.model_validate(settings)

    inputs = {layer.name: layer.in_features for layer in facts.linears}
    sketches = {f"{g.layers[0]}.sketch": torch.randn(SKETCH, inputs[g.layers[0]]).bfloat16() for g in groups}
    (folder / "calibration").mkdir()
    measurements.write(folder / "calibration", model, "statistics", sketches)
    measured = measurements.Measurements(folder / "calibration", model, "calibration")

    def compare() -> None:
        read, source = Stream(export), Stream(model)
        folds = Folds(read, source, groups, quantize, facts)
        weights.compare(read, source, family, groups, quantize, folds, measured)

    seconds = {"reading": _best(lambda: [_read(Stream(path)) for path in (model, export)]), "comparing": _best(compare)}
    size = weight_file_bytes(model) + weight_file_bytes(export)
    return {"bytes": size, **seconds, "ratio": round(seconds["comparing"] / seconds["reading"], 2)}


def _read(stream: Stream) -> None:
    with ThreadPoolExecutor(AHEAD) as pool:
        for _ in pool.map(lambda name: stream.tensor(name) is None, stream.names):
            pass


def _best(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(2):
        started = time.monotonic()
        work()
        taken.append(time.monotonic() - started)
    return round(min(taken), 2)


if __name__ == "__main__":
    raise SystemExit(main())
