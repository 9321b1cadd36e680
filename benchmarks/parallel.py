"""One model over two GPUs, by tensors and by stages, beside one: are its logits the same, and how fast does it decode.

Run: python benchmarks/parallel.py --out FOLDER [--quick]

Starts the processes itself, over NCCL; on a CPU two processes over gloo. Writes a line of parallel.jsonl as soon as it
is known. --quick leaves the model in the shape of Llama 3 8B out, as a CPU does. Exits with 1 where logits differ by
more than the order of their sums explains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import CUDA, log, release, roomy, versions
from random_model import EIGHT_BILLION, SMALL, random_model
from safetensors.torch import load_file, save_file

TINY = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096}  # fmt: skip
SHAPES = {"tiny": TINY, "Llama 3 8B": EIGHT_BILLION}
#: Name -> tensors and stages, and how far its logits may be from those of one process, of their root mean square.
LAYOUTS = {"tensor parallel 2": (2, 1, 0.03), "pipeline parallel 2": (1, 2, 1e-3)}
PROMPT_TOKENS, NEW_TOKENS, BATCHES = (128, 64, (1, 8)) if CUDA else (8, 4, (1,))
#: Seconds that the processes have, together.
LIMIT = 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/parallel"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="the tiny model alone")
    options = parser.parse_args()
    if CUDA and torch.cuda.device_count() < 2:
        print(f"two GPUs are needed, and there are {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    shapes = ["tiny"] if options.quick or not CUDA else list(SHAPES)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "parallel.jsonl"
    lines.write_text(json.dumps({"versions": versions()}) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=roomy(len(shapes) > 1)) as name:
        for shape in shapes:
            log(f"a random model: {shape}")
            random_model(Path(name) / shape, SHAPES[shape])
        environment = {**os.environ, "TRIMTAB_PROGRESS": f"{name}/progress.jsonl"}
        until = time.monotonic() + LIMIT
        for count in (1, 2):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            command = [sys.executable, *launch, __file__, "--rank", name, str(lines), *shapes]
            subprocess.run(command, env=environment, timeout=until - time.monotonic(), check=True)
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()][1:]
    for row in rows:
        speeds = ", ".join(f"{speed:,.0f} tokens/s at batch {batch}" for batch, speed in row["speeds"].items())
        apart = "" if row["apart"] is None else f"; logits {row['apart']:.2g} apart, {row['limit']} allowed"
        print(f"{row['model']}, {row['layout']}: {speeds} by {row['path']}{apart}")
    print(json.dumps(rows))
    return int(any(row["apart"] is not None and not row["apart"] <= row["limit"] for row in rows))


def rank(scratch: Path, lines: Path, shapes: list[str]) -> None:
    """One process: answers with its part of each model in each layout."""
    from trimtab.runtime.parallel import torchrun

    with torchrun.joined():
        for shape in shapes:
            layouts = LAYOUTS if torchrun.count() > 1 else {"one process": (1, 1, None)}
            for layout, (tensors, stages, limit) in layouts.items():
                row = measure(scratch, shape, tensors, stages)
                if torchrun.rank() == 0:
                    with lines.open("a", encoding="utf-8") as file:
                        print(json.dumps({"model": shape, "layout": layout, "limit": limit, **row}), file=file)
                release()


@torch.inference_mode()
def measure(scratch: Path, shape: str, tensors: int, stages: int) -> dict[str, Any]:
    from trimtab.recipe import Engine
    from trimtab.runtime.engines.torch_engine import TorchEngine
    from trimtab.runtime.parallel import shards

    log(f"{shape}, {tensors} x {stages}")
    settings = Engine(tensor_parallel_size=tensors, pipeline_parallel_size=stages, max_seq_len=256, max_batch_size=8)
    device = "cuda" if CUDA else "cpu"
    place = shards.place(settings, torch.device(device)) if tensors * stages > 1 else None
    started = time.monotonic()
    engine = TorchEngine(scratch / shape, settings, device, place=place)
    loaded = time.monotonic() - started
    vocabulary = SHAPES[shape]["vocab_size"]
    tokens = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(0)).to(engine.device)
    logits = engine.model(tokens, use_cache=False).logits.float().cpu()
    expected, apart = scratch / f"{shape}.logits", None
    if place:
        right = load_file(expected)["logits"]
        apart = float((logits - right).square().mean().sqrt() / right.square().mean().sqrt())
    else:
        save_file({"logits": logits}, expected)
    speeds = {batch: engine.decode_speed(batch, PROMPT_TOKENS, NEW_TOKENS, 1)[0] for batch in BATCHES}
    return {"apart": apart, "speeds": speeds, "path": engine.decode_path, "load_seconds": round(loaded, 1)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    sys.exit(main())
