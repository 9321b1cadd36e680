"""Everything that needs a GPU, in one run: quantize to each format there, check, load, generate, and time.

Run: python benchmarks/gpu.py --model FOLDER --out FOLDER [--sizes small 8b] [--formats NAME ...] [--quick]

Writes gpu.json and gpu.md into the output folder after every row, so that a run that is cut off has left what it
found; the last line is the same JSON without the texts. What fails is a row that says why. Without --model a random
model in the shape of SmolLM2-135M stands in: its speed is that model's, its perplexity means nothing.

Speeds are medians over rounds in which BF16 and the format take turns. A product's time is that of a CUDA graph over
as many copies of the layer as outgrow the cache. On a CPU what needs CUDA is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from pathlib import Path

from gpu_formats import FORMATS, Model
from gpu_products import ROWS, time_products
from gpu_results import Results
from machine import CUDA, roomy
from random_model import EIGHT_BILLION, SMALL, random_model

QUICK = ["fp8", "int8_sq", "int4_awq"]
SIZES = ("small", "8b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a small Hugging Face folder; a random one without it")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--text", default="builtin", help="file to measure perplexity on")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES[:1], help="8b: random weights")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="three formats of the small model, batches 1 and 8")
    parser.add_argument("--minutes", type=float, default=8, help="what is not begun by then is left out")
    parser.add_argument("--scratch", type=Path, help="folder with 30 GB of room for 8B; /dev/shm where it has them")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.formats = ["small"], QUICK
    results = Results(options.out, options.minutes)
    with tempfile.TemporaryDirectory(dir=options.scratch or roomy("8b" in options.sizes)) as name:
        scratch = Path(name)
        os.environ["TRIMTAB_PROGRESS"] = str(scratch / "progress.jsonl")  # the terminal is for results
        if CUDA:
            with results.part("products"):
                time_products(results, (1, 64, 1024) if options.quick else ROWS)
        if "small" in options.sizes:
            with results.part("small model"):
                folder = options.model or random_model(scratch / "model", SMALL)
                title = folder.name if options.model else "random, in the shape of SmolLM2-135M"
                Model(title, folder, scratch, options, small=True).run(results)
        if "8b" in options.sizes:
            with results.part("8B"):
                folder = random_model(scratch / "8b", EIGHT_BILLION)
                title = "random, in the shape of Llama 3 8B"
                Model(title, folder, scratch, options, small=False).run(results)
    results.write()
    brief = copy.deepcopy(results.found)
    for model in brief["models"]:
        for row in model["rows"]:
            row.pop("texts", None)
    print(json.dumps(brief))
    return 0



if __name__ == "__main__":
    sys.exit(main())
