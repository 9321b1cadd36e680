"""Where the time of a decoding step goes: BF16 on a GPU, with each way to launch fewer kernels, beside the limit.

Run: python benchmarks/decode.py [--model FOLDER | --eight-billion] [--compile] [--quick]

The limit is what the memory's bandwidth allows: bytes of weights, keys and values of a step over the measured speed of
a copy. Steps are replayed as a CUDA graph, and run in a loop on a CPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu import (
    CUDA,
    DEVICE,
    EIGHT_BILLION,
    SMALL,
    copy_bandwidth,
    describe,
    log,
    random_model,
    release,
    seconds_of,
    speed_limit,
    versions,
)

PROMPT_TOKENS, NEW_TOKENS = (128, 256) if CUDA else (16, 8)
#: Each variant has what those before it have.
VARIANTS = ("as transformers has it", "queries grouped", "norms fused", "compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an export or a Hugging Face folder; a random model without it")
    parser.add_argument("--eight-billion", action="store_true", help="a random model in the shape of Llama 3 8B")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="batch 1, two blocks")
    options = parser.parse_args()
    shape = EIGHT_BILLION if options.eight_billion else {**SMALL, "num_hidden_layers": 2} if options.quick else SMALL
    found: dict[str, Any] = {"versions": versions(), "gb_per_second": round(copy_bandwidth() / 1e9), "rows": []}
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRIMTAB_PROGRESS"] = str(Path(name) / "progress.jsonl")
        folder = options.model or random_model(Path(name) / "model", shape)
        for variant in VARIANTS if options.compile else VARIANTS[:-1]:
            found["rows"] += measure(folder, variant, options.batches[:1] if options.quick else options.batches)
    for row in found["rows"]:
        what = row.get("error") or f"{row['speed']:>10,.1f} tokens/s {row['of_limit']:>6.1%} of the limit"
        print(f"{row['variant']:<24} batch {row['batch']:>3} {what}")
    print(json.dumps(found))
    return 0


@torch.inference_mode()
def measure(folder: Path, variant: str, batches: list[int]) -> list[dict[str, Any]]:
    """Returns the tokens a second of all sequences together, and its share of the limit, by batch."""
    from trimtab.runtime import fewer_kernels
    from trimtab.runtime.assemble import assemble
    from trimtab.runtime.decode import Static

    log(variant)
    level, rows = VARIANTS.index(variant), []
    model = assemble(folder, DEVICE)
    if level >= 1:
        fewer_kernels.group_queries(model)
    if level >= 2:
        fewer_kernels.fuse_norms(model)
    for batch in batches:
        row = {"variant": variant, "batch": batch}
        rows.append(row)
        try:
            decoder = Static(model, batch, PROMPT_TOKENS, NEW_TOKENS, compiled=level == 3)
            if CUDA:
                decoder.capture()
            prompt = torch.ones(batch, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE)
            taken = []
            for _ in range(4):
                decoder.prefill(prompt)
                taken.append(seconds_of(lambda: decoder.steps(NEW_TOKENS)))  # noqa: B023, called in this turn
            row["speed"] = round(batch * NEW_TOKENS / statistics.median(taken[1:]), 1)
            row["of_limit"] = round(row["speed"] / speed_limit(model, batch, PROMPT_TOKENS + NEW_TOKENS / 2), 3)
            row["path"] = decoder.path
        except Exception as error:  # the others are worth having
            row["error"] = describe(error)
        decoder = None
        release()
    return rows


if __name__ == "__main__":
    sys.exit(main())
