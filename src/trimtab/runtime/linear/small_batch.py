"""Products of a matrix with few rows, which is all that decoding does: read the matrix once, at the memory's speed.

Libraries compute few rows with kernels made for many: on an H100 cuBLAS's FP8 product of one row with a layer of
4096 x 4096 reads a third of what the memory could give, and PyTorch has no quick one for INT8. Triton's `matvec` gives
each program a few rows of the matrix, `matmul_kernel` a tile of it. Which is fastest, and how it is cut, depends on the
shape and the card: so it is measured when a model is loaded, once for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.runtime.kernels import cuda_graphs, tile
from trimtab.runtime.kernels.tile import Tile
from trimtab.runtime.linear import choice

#: Outputs and inputs that a program of `matvec` has at a time, and its warps.
BLOCKS = (
    (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 1024, 4), (16, 512, 4), (8, 1024, 8),
)  # fmt: skip
#: Rows that products are chosen for; one serves fewer rows too, down to the next.
ROWS = (1, 16, 64)

Multiply = Callable[[torch.Tensor], torch.Tensor]
#: How a product is cut: one of `BLOCKS`, or a tile.
Cut = tuple[int, ...]
#: A layer, and what a product takes of it beside its input.
Member = tuple[nn.Module, dict[str, Any]]


class Chosen:
    """A layer's fastest product for each number of rows.

    Args:
        by_rows: (rows at most, product), the fewest first; more rows are the layer's own.
    """

    def __init__(self, layer: nn.Module, by_rows: list[tuple[int, Multiply]]):
        self._by_rows, self._layer = by_rows, layer

    def __call__(self, x_RI: torch.Tensor) -> torch.Tensor:
        product = next((product for most, product in self._by_rows if len(x_RI) <= most), self._layer)
        return product(x_RI)


def operands(layer: nn.Module) -> dict[str, Any] | None:
    """Returns a layer's `weight`, `bias`, and what `matvec` takes beside; None where it has no such product."""
    if isinstance(layer, nn.Linear):
        return {"weight": layer.weight, "bias": layer.bias}
    if not isinstance(layer, choice.PackedLinear) or layer.pre_quant_scale is not None:
        return None
    if isinstance(layer, choice.Fp8):
        scale = (layer.weight_scale * layer.input_scale).reshape(-1)
        found = {"weight": layer.weight_OI, "scale": scale, "to_codes": layer.to_codes_1, "rounding": "fp8"}
    elif isinstance(layer, choice.Int8Static):
        found = {"weight": layer.weight_OI, "scale": layer.scale_O, "to_codes": layer.to_integers, "rounding": "int8"}
    elif isinstance(layer, choice.WeightOnly):
        found = {"weight": layer.words_OW, "scale": layer.scale}
    else:
        return None
    return {**found, "bias": layer.bias}


@torch.inference_mode()
def choose(layers: Iterable[nn.Module]) -> dict[nn.Module, Chosen]:
    """Returns the faster products, [R, I] -> [R, O], of those layers on a GPU that have any."""
    found: dict[nn.Module, Chosen] = {}
    for members in by_shape(layers):
        best = {rows: min(times, key=times.get) for rows in ROWS if (times := measure(members, rows))}
        if any(best.values()):
            for layer, given in members:
                by_rows = [(rows, product(layer, given, cut) if cut else layer) for rows, cut in best.items()]
                found[layer] = Chosen(layer, by_rows)
    return found


def by_shape(layers: Iterable[nn.Module]) -> list[list[Member]]:
    """Returns the layers that have such products, those of one kind and shape together.

    A layer that others wait for, as in tensor parallelism, keeps its own.
    """
    kinds: dict[tuple, list[Member]] = {}
    for layer in dict.fromkeys(layers):
        given = operands(layer)
        if given and not layer._forward_hooks:
            shapes = {name: tensor.shape for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
            key = (type(layer), given["weight"].dtype, *shapes.items())
            kinds.setdefault(key, []).append((layer, given))
    return list(kinds.values())


@torch.inference_mode()
def measure(members: list[Member], rows: int) -> dict[Cut | None, float]:
    """Returns the seconds of a product with so many rows by its cut, None for the layers' own.

    One that fails, or computes other numbers than the first layer, is left out.
    """
    layer, given = members[0]
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0)).to(given["weight"].device)
    if "to_codes" in given:
        x *= 32 / given["to_codes"]  # within the range of INT8, and of FP8
    x = x.bfloat16()
    expected = layer(x).float()
    some = members[: -(-cuda_graphs.COLD_BYTES // given["weight"].nbytes)]
    found: dict[Cut | None, float] = {None: _seconds([layer for layer, _ in some], x)}
    for cut in cuts(layer, given, rows):
        try:
            products = [product(layer, given, cut) for layer, given in some]
            if (products[0](x).float() - expected).norm() <= 0.01 * expected.norm():
                found[cut] = _seconds(products, x)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a compiler says about a card
            continue
    return found


def cuts(layer: nn.Module, given: dict[str, Any], rows: int) -> tuple[Cut, ...]:
    """Returns the cuts to try for a number of rows; with several, cuBLAS is as fast in 16 bits as anything."""
    in_words, tiles = isinstance(layer, choice.WeightOnly), ()
    if given["bias"] is None and not isinstance(layer, nn.Linear):  # a tile adds none
        tiles = (tile.WORDS,) if in_words else (tile.BYTES, tile.SMALL_BYTES)
    sizes = (*given["weight"].shape, layer.undivided if in_words else 0)
    dividing = (tuple(cut for cut in some if cut.divides(*sizes)) for some in tiles)
    fitting = next(filter(None, dividing), ())
    return fitting if rows > 1 or in_words else BLOCKS + fitting


def product(layer: nn.Module, given: dict[str, Any], cut: Cut) -> Multiply:
    """Returns the product of a layer by one of its cuts."""
    from trimtab.runtime.kernels import decoding, matmul

    if not isinstance(cut, Tile):
        return partial(decoding.matvec, block=cut, **given)
    if isinstance(layer, choice.WeightOnly):
        return layer.by(cut)
    multiply = matmul.Matmul(given["weight"], given["scale"], cut)
    return lambda x_RI: multiply(layer.codes(x_RI))


def _seconds(products: list[Multiply], x: torch.Tensor) -> float:
    return cuda_graphs.seconds([partial(product, x) for product in products])
