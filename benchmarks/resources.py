"""What stages use beside what is forecast of them (`trimtab.planning.resources`), on this machine.

Run: python benchmarks/resources.py [--shape tiny|middle|8b] [--stages calibrate,quantize,…] [--tokens N] [--folder F]
Random weights; each stage's work runs in a process of its own, as in a run. The last line is one JSON object: by stage
`forecast` and `used` of host, GPU and disk in bytes, and seconds. On a GPU the forecast is of a target of its size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from random_model import EIGHT_BILLION, SMALL, random_model

from trimtab.base import child, environment
from trimtab.model import hardware
from trimtab.model.facts import inspect
from trimtab.planning.resources import Resources, columns, needs
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages import STAGES, usage

SHAPES = {
    "tiny": {**SMALL, "num_hidden_layers": 4, "vocab_size": 8192},
    "middle": {**EIGHT_BILLION, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12,
               "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32768},
    "8b": EIGHT_BILLION,
}  # fmt: skip
#: One recipe for each kind of work.
RECIPES = (
    "quantize: {format: int8_sq}", "quantize: {format: int4_gptq, exclude_sensitive: 2}",
    "prune: {method: sparsegpt, pattern: '2:4'}", "prune: {method: depth, blocks: 1}",
    "distill: {tokens: 8192, length: 256, batch_size: 4, generate: 4096, stored_logits: 64}",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--stages", default="", help="only these, by name")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    parser.add_argument("--target", default="h200" if "gpu" in environment.device() else "cpu")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-resources-", dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments)))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages of all recipes, prints what each was forecast to need and what it used, and returns both."""
    model, machine = random_model(folder / "model", SHAPES[arguments.shape]), hardware.target(arguments.target)
    facts, asked = inspect(model), [name for name in arguments.stages.split(",") if name]
    found: dict[str, Any] = {}
    for number, text in enumerate(RECIPES):
        samples = max(1, arguments.tokens // 512)
        recipe = Recipe.parse(f"calibrate: {{samples: {samples}, length: 512}}\n{text}")
        forecast = needs(facts, recipe, machine, evaluation=Evaluation())
        if asked and not forecast.keys() & {*asked}:
            continue
        trees: dict[str, Path] = {"model": model, "checkpoint": model}
        for name, stage in STAGES.items():
            if not stage.wanted(recipe) or (name == "recalibrate" and recipe.prune is None and recipe.distill is None):
                continue
            place, inputs = folder / f"{number}-{name}", {key: trees.get(key) for key in stage.inputs}
            if "export" in inputs:
                inputs["export"] = trees.get("export", trees["checkpoint"])
            used = _work(stage, recipe, place, {key: tree and str(tree) for key, tree in inputs.items()})
            trees[stage.output] = place / "output"
            if not asked or name in asked:
                label = f"{name}: {recipe.title}"
                found[label] = {"forecast": forecast[name].to_dict(), "used": used.to_dict()}
                _show(label, forecast[name], used)
    return found


def _work(stage: Any, recipe: Recipe, place: Path, inputs: dict[str, str | None]) -> Resources:
    output, scratch = place / "output", place / "scratch"
    output.mkdir(parents=True)
    with usage.disk_watched(place) as disk:
        done = child.call(
            stage.work, **inputs, output=str(output), scratch=str(scratch), parameters=stage.parameters(recipe)
        )
    told = {"peak_memory_bytes": done.peak_memory_bytes, "peak_gpu_bytes": done.peak_gpu_bytes}
    return usage.used({**told, "peak_disk_bytes": disk.bytes}, done.seconds)


def _show(label: str, forecast: Resources, used: Resources) -> None:
    ratio = used.host_bytes / max(forecast.host_bytes, 1)
    print(f"{label:<60} forecast {columns(forecast)} used {columns(used)} host {ratio:.2f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
