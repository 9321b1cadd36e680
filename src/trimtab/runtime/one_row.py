"""Products of a matrix with one row, which is all that decoding at batch 1 does: read the matrix once, at full speed.

cuBLAS computes one row with kernels made for many; in FP8 they reach a third of the memory's bandwidth, and INT8 has
none that are quick. Triton's `matvec` gives each program a few rows of the matrix. Which is faster, and with how many
rows a program, depends on the shape and the card: so it is measured when a model is loaded, for each shape once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.runtime import linear

#: Outputs and inputs that a program has at a time, and its warps.
BLOCKS = (
    (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 1024, 4), (16, 512, 4), (8, 1024, 8),
)  # fmt: skip
#: Bytes that are read before a matrix comes again: more than twice the L2 cache of an H200.
_COLD_BYTES = 160 << 20
_ROUNDS = 3

Product = Callable[[torch.Tensor], torch.Tensor]


def operands(layer: nn.Module) -> dict[str, Any] | None:
    """Returns what `triton_kernels.matvec` takes of a layer beside its input, or None where it has no such product."""
    if type(layer) is nn.Linear:
        return {"weight_OI": layer.weight, "bias": layer.bias}
    if not isinstance(layer, linear.PackedLinear) or layer.pre_quant_scale is not None:
        return None
    if isinstance(layer, linear.Fp8):
        scale = (layer.weight_scale * layer.input_scale).reshape(-1)
        found = {"scale": scale, "to_codes": layer.to_codes_1, "rounding": "fp8"}
    elif isinstance(layer, linear.Int8Static):
        found = {"scale": layer.scale_O, "to_codes": layer.to_integers, "rounding": "int8"}
    elif isinstance(layer, linear.Int8WeightOnly):
        found = {"scale": layer.scale_O.float()}
    else:
        return None
    return {"weight_OI": layer.weight_OI, "bias": layer.bias, **found}


@torch.inference_mode()
def choose(layers: Iterable[nn.Module]) -> dict[nn.Module, Product]:
    """Returns a faster product of one row, [1, I] -> [1, O], for those layers on a GPU that have one."""
    found: dict[nn.Module, Product] = {}
    for members in by_shape(layers):
        times = measure(members)
        block = min(times, key=times.get)
        if block is not None:
            found |= {layer: _product(given, block) for layer, given in members}
    return found


def by_shape(layers: Iterable[nn.Module]) -> list[list[tuple[nn.Module, dict[str, Any]]]]:
    """Returns the layers that `matvec` can stand in for, with their operands, those of one kind and shape together.

    A layer that others wait for, as in tensor parallelism, keeps its own product.
    """
    kinds: dict[tuple, list[tuple[nn.Module, dict[str, Any]]]] = {}
    for layer in dict.fromkeys(layers):
        given = operands(layer)
        if given and not layer._forward_hooks:
            key = (type(layer), given["weight_OI"].dtype, *given["weight_OI"].shape, given["bias"] is None)
            kinds.setdefault(key, []).append((layer, given))
    return list(kinds.values())


@torch.inference_mode()
def measure(members: list[tuple[nn.Module, dict[str, Any]]]) -> dict[tuple[int, int, int] | None, float]:
    """Returns the seconds of a product by its block, None for the layers' own.

    A block that fails, or computes other numbers than the first layer, is left out.
    """
    layer, given = members[0]
    weight = given["weight_OI"]
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    if "to_codes" in given:
        x *= 32 / given["to_codes"]  # within the range of INT8, and of FP8
    x = x.bfloat16()
    expected = layer(x).float()
    some = members[: -(-_COLD_BYTES // weight.nbytes)]
    found: dict[tuple[int, int, int] | None, float] = {None: _seconds([layer for layer, _ in some], x)}
    for block in BLOCKS:
        products = [_product(given, block) for _, given in some]
        try:
            if (products[0](x).float() - expected).norm() <= 0.01 * expected.norm():
                found[block] = _seconds(products, x)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a compiler says about a card
            continue
    return found


def _product(given: dict[str, Any], block: tuple[int, int, int]) -> Product:
    from trimtab.runtime import triton_kernels

    return partial(triton_kernels.matvec, block=block, **given)


def _seconds(products: list[Product], x: torch.Tensor) -> float:
    """Returns the seconds of one of the products, in the fastest of several replays of a CUDA graph of all."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        products[0](x)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    taken = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return min(taken) / len(products)
