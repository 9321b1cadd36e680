"""One layer in every kernel, packed and dense, by the number of rows: where the engine's `packed_rows` come from.

A product's time is that of a CUDA graph over as many copies of the layer as outgrow the cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_results import Results
from machine import DEVICE, describe, release

from trimtab.runtime.kernels import cuda_graphs
from trimtab.runtime.linear.choice import WeightOnly

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ((4096, 4096), (14336, 4096))
ALGORITHMS = {"int4": "W4A16_AWQ", "int8": "W8A16", "fp8": "FP8", "fp8 per token": "FP8_PER_CHANNEL_PER_TOKEN",
              "int8 static": "W8A8_SQ_PER_CHANNEL"}  # fmt: skip
PATHS = (("int4", "packed"), ("int4", "dense"), ("int8", "packed"), ("int8", "dense"), ("fp8", "dense"),
         ("fp8 per token", "dense"), ("int8 static", "dense"))  # fmt: skip


@torch.inference_mode()
def time_products(results: Results, rows: tuple[int, ...]) -> None:
    """Adds a line for each shape and kernel."""
    for out_features, in_features in SHAPES:
        lines = {"bf16": lambda: dense_layer(out_features, in_features)}  # noqa: B023, called in this turn
        for kind, path in PATHS:
            lines[f"{kind}, {path}"] = lambda k=kind, p=path: packed_layer(k, p, out_features, in_features)  # noqa: B023
        for name, make in lines.items():
            line: dict[str, Any] = {"shape": f"{out_features} x {in_features}", "product": name, "microseconds": {}}
            results.found["products"].append(line)
            try:
                products = make()
                for count in rows:
                    if "packed" in name and count > WeightOnly.packed_rows:
                        break
                    x = torch.randn(count, in_features, device=DEVICE, dtype=torch.bfloat16)
                    works = [partial(product, x) for product in products]
                    line["microseconds"][str(count)] = round(1e6 * cuda_graphs.seconds(works), 1)
            except Exception as error:
                line["error"] = describe(error)
            products = None
            release()


def dense_layer(out_features: int, in_features: int) -> list[Callable]:
    size = 2 * out_features * in_features
    weights = [
        torch.randn(out_features, in_features, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(math.ceil(cuda_graphs.COLD_BYTES / size))
    ]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]


def packed_layer(kind: str, path: str, out_features: int, in_features: int) -> list[Callable]:
    """The products of copies of a layer whose numbers are drawn at random."""
    from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized
    from trimtab.runtime.linear import choice

    algo = ALGORITHMS[kind]
    scale = torch.full((out_features,), 0.01, device=DEVICE)
    given = torch.tensor(0.03, device=DEVICE)
    if algo == "W4A16_AWQ":
        weight = torch.randint(256, (out_features // 2, in_features), dtype=torch.uint8, device=DEVICE)
        layer = Quantized(Layout(algo, 128), weight, scale[:, None].expand(-1, in_features // 128).contiguous())
    else:
        weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=DEVICE)
        if "FP8" in algo:
            weight = (weight.bfloat16() / 32).to(torch.float8_e4m3fn)
        layer = Quantized(Layout(algo), weight, scale[0] if algo == "FP8" else scale, given)
    first = choice.build(layer, None, DEVICE)
    size = out_features * in_features // (2 if algo == "W4A16_AWQ" else 1)
    modules = [first, *(copy.deepcopy(first) for _ in range(math.ceil(cuda_graphs.COLD_BYTES / size) - 1))]
    return [getattr(module, path) for module in modules]
