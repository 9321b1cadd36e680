"""Layers that read one input, as one product: q, k and v of an attention, gate and up of an MLP.

Their weights stand one under the other, so every number comes from the same products and sums as before; only the
kernel may take the sums in another order. A decoding step then reads a few large matrices instead of many small ones,
which neither fill a GPU nor pay for their launch. Layers in FP8 whose weights have scales of their own get one for each
row; layers that round their input differently stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from trimtab.families import Family
from trimtab.runtime.checkpoint.layer_layout import Quantized
from trimtab.runtime.linear.choice import PackedLinear

#: Scales that a joined layer has once.
_SHARED = ("input_scale", "pre_quant_scale", "weight_scale_2")


class FusedLinear(nn.Module):
    """One layer in the place of several: called, it returns all their outputs side by side, [..., sum of sizes]."""

    def __init__(self, layer: nn.Linear | PackedLinear, sizes: list[int]):
        super().__init__()
        self.layer, self.sizes = layer, sizes
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Returns one layer's output; it is computed when the first of them is asked for `x`, and each given once."""
        if self._input is not x or number not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self(x).split(self.sizes, dim=-1)))
        found = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return found


class FusedPart(nn.Module):
    """Stands where a model expects one of a product's layers."""

    def __init__(self, product: FusedLinear, number: int):
        super().__init__()
        self.product, self.number = product, number
        self.in_features, self.out_features = product.layer.in_features, product.sizes[number]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.part(self.number, x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, part {self.number}"


def groups(names: Iterable[str], family: Family) -> Iterator[list[str]]:
    """Yields each of the names of layers once, with those that read the same input if all of a group are there: in the
    order in which their outputs stand."""
    left = dict.fromkeys(names)
    for name in list(left):
        if name not in left:
            continue
        block, within = family.place(name)
        shared = None if block is None else family.shared_input(within)
        group = [f"{family.blocks}.{block}.{layer.name}" for layer in shared.layers] if shared else [name]
        found = group if all(member in left for member in group) else [name]
        for member in found:
            del left[member]
        yield found


def join(layers: list[Quantized]) -> Quantized | None:
    """Returns the layer of all outputs, or None where they differ in what a layer has once.

    An FP8 layer so joined may have a `weight_scale` for each row, which a stored one never has.
    """
    first = layers[0]
    if any(layer.layout != first.layout or layer.shape[1] != first.shape[1] for layer in layers):
        return None
    if not all(_same([getattr(layer, scale) for layer in layers]) for scale in _SHARED):
        return None
    scales = [layer.weight_scale for layer in layers]
    if first.layout.group_size:
        scale = torch.cat(scales)
    elif first.layout.storage.scale == "tensor" and _same(scales):
        scale = scales[0]
    else:
        rows = [layer.shape[0] for layer in layers]
        scale = torch.cat([scale.reshape(-1).expand(count) for scale, count in zip(scales, rows, strict=True)])
    shared = {name: getattr(first, name) for name in _SHARED}
    return Quantized(first.layout, torch.cat([layer.weight for layer in layers]), scale, **shared)


def _same(tensors: list[torch.Tensor | None]) -> bool:
    first = tensors[0]
    if first is None:
        return all(tensor is None for tensor in tensors)
    return all(tensor is not None and torch.equal(first.flatten(), tensor.flatten()) for tensor in tensors[1:])


def place(model: nn.Module, names: list[str], layer: nn.Linear | PackedLinear, sizes: list[int]) -> None:
    """Puts one layer in the place of several, whose outputs have these sizes."""
    product = FusedLinear(layer, sizes)
    for number, name in enumerate(names):
        model.set_submodule(name, FusedPart(product, number))


@torch.no_grad()
def fuse_linears(model: nn.Module, family: Family) -> int:
    """Joins the layers that are not quantized, and returns how many products that makes."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    count = 0
    for group in groups(names, family):
        layers = [model.get_submodule(name) for name in group]
        first = layers[0]
        biased = [layer.bias is not None for layer in layers]
        same = all(x.in_features == first.in_features and x.weight.dtype == first.weight.dtype for x in layers)
        if len(layers) == 1 or not same or len(set(biased)) > 1:
            continue
        sizes = [layer.out_features for layer in layers]
        joined = nn.Linear(first.in_features, sum(sizes), bias=False, device="meta")
        joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if biased[0]:
            joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
        place(model, group, joined.eval(), sizes)
        count += 1
    return count


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Returns the packed layer that computes each quantized layer of a model, by the names that the export uses."""
    found = {}
    for name, module in model.named_modules():
        layer = module.product.layer if isinstance(module, FusedPart) else module
        if isinstance(layer, PackedLinear) and ".product" not in name:
            found[name] = layer
    return found
