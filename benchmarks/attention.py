"""Attention over a paged KV cache: the engine's kernel beside gathered blocks and PyTorch's attention, on a GPU.

Run: python benchmarks/attention.py [--out FILE] [--quick]

The heads of Llama 3 8B, one token a sequence, as in decoding; blocks of 16 stand in any order. A time is that of a CUDA
graph over as many layers as outgrow the cache. GB/s are those of the keys and values that a sequence has. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import CUDA, DEVICE, copy_bandwidth, describe, release, versions

from trimtab.runtime.kernels import cuda_graphs
from trimtab.runtime.kernels.spans import Spans
from trimtab.runtime.kv_cache import paged_attention
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.kv_cache.paged_attention import Pass

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
#: Sequences, and tokens of the cache that each looks at.
SHAPES = ((1, 256), (8, 256), (64, 256), (1, 4096), (8, 4096), (64, 4096), (1, 32768), (64, 1024))
FORMATS = (None, "FP8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the result, as JSON")
    parser.add_argument("--quick", action="store_true", help="two shapes in 16 bits")
    options = parser.parse_args()
    if not CUDA:
        print("benchmarks/attention.py: times kernels, and finds no GPU", file=sys.stderr)
        return 2
    found: dict[str, Any] = {**versions(), "gb_per_second": round(copy_bandwidth() / 1e9), "rows": []}
    for algorithm in FORMATS[:1] if options.quick else FORMATS:
        for sequences, tokens in SHAPES[:2] if options.quick else SHAPES:
            row = {"sequences": sequences, "tokens": tokens, "cache": algorithm or "bf16"}
            row |= measure(sequences, tokens, algorithm)
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            release()
    if options.out:
        options.out.write_text(json.dumps(found))
    print(json.dumps(found))
    return 0


@torch.inference_mode()
def measure(sequences: int, tokens: int, algorithm: str | None) -> dict[str, Any]:
    """Returns microseconds of a layer's attention by its way, and the GB/s of the kernel."""
    width = tokens // BLOCK
    each = 2 * sequences * tokens * KV_HEADS * SIZE * (1 if algorithm else 2)
    layers = max(1, -(-cuda_graphs.COLD_BYTES // each))
    shapes = dict.fromkeys(range(layers), (KV_HEADS, SIZE))
    scales = dict.fromkeys(range(layers), (0.02, 0.03))
    cache = PagedKVCache(shapes, sequences * width, BLOCK, DEVICE, algorithm, scales if algorithm else None)
    for layer in range(layers):
        for stored in cache.tensors(layer):
            stored.copy_(torch.randn(stored.shape, device=DEVICE).to(stored.dtype))
    tables = torch.randperm(sequences * width, device=DEVICE).view(sequences, width)
    lengths = torch.full((sequences,), tokens, device=DEVICE)
    number = torch.arange(sequences, device=DEVICE)
    spans = Spans(
        torch.stack([number, torch.ones_like(number), lengths - 1, number], dim=1).int(), tables.int(), 1
    )
    where = Pass(cache, number, tables, lengths, [], spans)
    query = torch.randn(sequences, HEADS, SIZE, device=DEVICE, dtype=torch.bfloat16)
    scale = SIZE**-0.5
    where.decode_mask(None)  # made once a step, and not for each layer
    ways = {
        "kernel": lambda layer: cache.attend(layer, query, spans, scale),
        "gathered": lambda layer: paged_attention.decode_attention(query, where, layer, scale, None),
    }
    expected, row = ways["gathered"](0).float(), {}
    for name, way in ways.items():
        try:
            off = float((way(0).float() - expected).norm() / expected.norm())
            row[name] = round(1e6 * cuda_graphs.seconds([partial(way, layer) for layer in range(layers)]), 1)
            row[f"{name} off by"] = round(off, 4)
        except Exception as error:
            row[name] = describe(error)
    if isinstance(row["kernel"], float):
        row["kernel GB/s"] = round(each / row["kernel"] / 1000)
    return row


if __name__ == "__main__":
    sys.exit(main())
