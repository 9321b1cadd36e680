"""Gram matrices of what the linear layers of a block read, while a block is in place: used, and dropped.

The Gram matrix is the mean of x xᵀ over the calibration tokens, half the Hessian of the squared error of the layer's
output (Frantar et al. 2022, "GPTQ"). An expert's is over the tokens that it is given, or over all where these are too
few (`routing`), and still divided by all tokens: rounding by it does not depend on its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from trimtab.runtime.measure import observe, routing
from trimtab.runtime.measure.block import Block, Rounding

#: Bytes of sums held at once. A block with more of them is run over the text several times.
BUDGET = 8 << 30


def chunks(block: Block, layers: Sequence[str]) -> Iterator[list[str]]:
    """Yields layers of a block, in their order, so many at a time as their Gram matrices fit the budget."""
    chunk: list[str] = []
    held = 0
    for name in layers:
        size = 4 * block.layers[name].in_features ** 2
        if chunk and held + size > BUDGET:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk


def measure(
    block: Block, layers: Sequence[str], rare: Mapping[str, Sequence[int]], advance: bool = False
) -> dict[str, torch.Tensor]:
    """Returns the Gram matrices of what layers of a block read, float32 [in, in], on the device, by layer.

    Args:
        layers: the first ones of their groups.
        rare: experts that are run on every token besides, by the name of their mixture; and so are those that no token
            was given to, because what was changed in the blocks before has changed the routers' choice.
        advance: what comes out of the block, the next one reads.

    Raises:
        Failure: `unsupported`, an activation that is not finite.
    """

    def run(names: Sequence[str], chosen: Mapping[str, Sequence[int]], step: Callable[[], None]) -> dict:
        with observe.grams({n: block.layers[n] for n in names}) as sums, routing.run_on_all(block.mixtures, chosen):
            step()
        return sums

    here = {name: rare[name] for name in block.mixtures if name in rare}
    found = run(layers, here, (lambda: block.advance(bool(block.mixtures))) if advance else block.run)
    unseen = {name: block.family.expert(name) for name in layers if block.family.is_expert(name)}
    unseen = {name: int(number) for name, (number, _) in unseen.items() if not found[name].any()}
    if unseen:
        found |= run(list(unseen), dict.fromkeys(block.mixtures, sorted({*unseen.values()})), block.run)
    for gram in found.values():
        gram.div_(block.tokens)
    observe.check_finite({f"{name}.gram": gram for name, gram in found.items()})
    return found


def measure_beside(
    block: Block, layer: str, part: float = 1.0, reads: Rounding | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns two means over the text for a layer that every token is given to, float32 [in, in] each: the Gram matrix,
    of x xᵀ where x is what the layer's product sees of its input; and that of d xᵀ where d is what x lacks: all that
    rounding took from the input, and a part of what this lacks beside the dense stream. None where neither is there.

    Args:
        part: of what the input lacks beside the dense stream; with 0 that is not run.
        reads: what the product sees of an input; None where it sees it as it is.

    Raises:
        Failure: `unsupported`, an activation that is not finite.
    """
    size, device = block.layers[layer].in_features, block.layers[layer].weight.device
    gram = torch.zeros(size, size, device=device)
    beside = block.dense is not None and part > 0
    lack = torch.zeros(size, size, device=device) if beside or reads is not None else None
    for given, dense in block.inputs(layer, beside):
        seen = given if reads is None else reads(given)
        observe.add_product(gram, seen, seen)
        if dense is not None:
            # The difference of two bfloat16 numbers within a factor of two is one, so nothing is lost here.
            observe.add_product(lack, (dense - given) * part, seen)
        if reads is not None:
            observe.add_product(lack, given - seen, seen)
    found = {f"{layer}.gram": gram.div_(block.tokens)}
    if lack is not None:
        found[f"{layer}.lack"] = lack.div_(block.tokens)
    observe.check_finite(found)
    return gram, lack
