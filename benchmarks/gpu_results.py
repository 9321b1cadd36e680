"""What benchmarks/gpu.py found so far, and the tables it makes of it."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import describe, log, versions


class Results:
    """What was found so far, written anew whenever something is added."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.started, self.seconds = folder, time.perf_counter(), 60 * minutes
        self.found: dict[str, Any] = {"versions": versions(), "models": [], "products": [], "failures": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the run should end."""
        return self.started + self.seconds - time.perf_counter()

    def write(self) -> None:
        self.found["seconds"] = round(time.perf_counter() - self.started)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        try:
            (self.folder / "gpu.md").write_text(markdown(self.found), encoding="utf-8")
        except (KeyError, IndexError, TypeError, ValueError):  # the figures are safe in gpu.json
            traceback.print_exc()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Runs a part whose failure leaves the others alone."""
        log(name)
        try:
            yield
        except Exception as error:
            self.found["failures"].append({"part": name, "error": describe(error)})
            traceback.print_exc()
        self.write()


def markdown(found: dict[str, Any]) -> str:
    """The results as they are committed under benchmarks/results/."""
    known = found["versions"]
    lines = [
        f"# On {known['card']}",
        "",
        f"{known['date']}, PyTorch {known['torch']}, CUDA {known['cuda']}, transformers {known['transformers']}, "
        f"ModelOpt {known['nvidia-modelopt']}; printed by `python benchmarks/gpu.py`.",
    ]
    for model in found["models"]:
        lines += ["", *model_lines(model)]
    for shape in dict.fromkeys(line["shape"] for line in found["products"]):
        lines += ["", *product_lines(shape, [line for line in found["products"] if line["shape"] == shape])]
    lines += ["", *(f"Failed: {failure['part']}: {failure['error']}" for failure in found["failures"])]
    return "\n".join(lines).rstrip() + "\n"


def model_lines(model: dict[str, Any]) -> list[str]:
    lines = [f"## {model['title']}", ""]
    if "statistics_over_forward" in model:
        lines += [
            f"Calibration reads {model['tokens']:,} tokens: {model['statistics_seconds']:.3g} s with statistics, "
            f"{model['statistics_over_forward']:.2f} times a bare forward pass."
            + "".join(
                f" {what}: {model[key]} s."
                for what, key in (("Gram matrices", "gram_seconds"), ("Sensitivity", "sensitivity_seconds"))
                if key in model
            ),
            "",
        ]
    first = model["rows"][0] if model["rows"] else {}
    if "loop_speed" in first:
        speed = f"{first['loop_speed']} tokens/s in a Python loop at batch 1; below: {first.get('decode_path')}"
        lines += [f"BF16 decodes {speed}. GiB are of the GPU at most, beside the baseline held there. "
                  "In brackets: times BF16's speed, and the share of what the memory's bandwidth allows.", ""]
    batches = list(dict.fromkeys(batch for row in model["rows"] for batch in row.get("speed", {})))
    header = ["format", "kernel", "emulated", "GB", *(f"tokens/s, batch {batch}" for batch in batches), "perplexity",
              "largest layer error", "quantize s", "quantize GiB", "serve GiB"]  # fmt: skip
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in model["rows"]:
        if "error" in row:
            lines.append(f"| {row['format']} | {row['error'].replace('|', '/').replace(chr(10), ' ')} |")
            continue
        cells = [row["format"], ", ".join(row.get("kernels", [])) or "dense", f"{row.get('emulated', 0)} of "
                 f"{row.get('layers', 0)}", row.get("weight_gb", "")]  # fmt: skip
        for batch in batches:
            told = ("over_bf16", "{:.2f}x"), ("of_limit", "{:.0%}")
            notes = ", ".join(form.format(row[name][batch]) for name, form in told if row.get(name, {}).get(batch))
            speed = row.get("speed", {}).get(batch)
            cells.append("" if speed is None else f"{speed:,.0f}" + f" ({notes})" * bool(notes))
        names = ("perplexity", "largest_layer_error", "quantize_seconds", "quantize_gib", "serve_gib")
        lines.append(f"| {' | '.join(str(cell) for cell in [*cells, *(row.get(name, '') for name in names)])} |")
    if "left_out" in model:
        lines += ["", f"Left out: {model['left_out']}."]
    return lines


def product_lines(shape: str, products: list[dict[str, Any]]) -> list[str]:
    rows = list(dict.fromkeys(count for line in products for count in line["microseconds"]))
    lines = [f"## One layer of {shape}, microseconds a product by rows", ""]
    lines += [f"| product | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for line in products:
        times = [str(line["microseconds"].get(count, "")) for count in rows]
        lines.append(f"| {line['product']} | {line['error'] if 'error' in line else ' | '.join(times)} |")
    return lines
