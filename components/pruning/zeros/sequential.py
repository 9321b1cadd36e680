"""Prunes each block of a model before the next one sees what comes out of it.

Memory holds what `runtime.measure.blockwise` does, and a block's Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from trimtab.base.errors import Failure
from trimtab.families.fusion import block_of
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure import blockwise, grams
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import NotByBlock

#: (the names and weights of layers that share an input, its Gram matrix) -> their pruned weights.
Prune = Callable[[Mapping[str, torch.Tensor], torch.Tensor], Mapping[str, torch.Tensor]]


@torch.inference_mode()
def prune_blocks(
    checkpoint: Path,
    tokens: torch.Tensor,
    layers: Collection[str],
    rare: Mapping[str, Sequence[int]],
    scratch: Path,
    prune: Prune,
) -> None:
    """Writes the pruned weights of each block into the scratch folder, where `read` finds them.

    Activations are float32 on a CPU, bfloat16 on a GPU; Gram matrices are `grams.measure`'s.

    Args:
        checkpoint: a plain checkpoint.
        tokens: what the model is run on, int64 [samples, length].
        layers: the linear layers to prune.
        rare: experts that are measured on every token, by the name of their mixture.
        scratch: what an earlier try left there is used.

    Raises:
        InputError: a weight that is not finite.
        Failure: `unsupported`, activations that are not finite, or a model that cannot be run a block at a time.
    """
    try:
        runner = blockwise.Runner(checkpoint, tokens, "prune", "pruning blocks", scratch)
    except NotByBlock as reason:
        what = f"sparsegpt cannot run this model a block at a time: {reason}"
        raise Failure("unsupported", f"prune.method: {what}; write wanda") from None
    export = Export(checkpoint)

    def work(block: Block) -> dict[str, torch.Tensor]:
        shared = {g.layers[0]: [name for name in g.layers if name in layers] for g in block.groups}
        shared = {first: names for first, names in shared.items() if names}
        found: dict[str, torch.Tensor] = {}
        for chunk in grams.chunks(block, list(shared)):
            measured = grams.measure(block, chunk, rare)
            for first in chunk:
                pruned = prune({name: block.layers[name].weight for name in shared[first]}, measured.pop(first))
                for name, weight in pruned.items():
                    found[f"{name}.weight"] = weight.to(export.view(f"{name}.weight").dtype)
        for name, weight in found.items():  # the next block sees what the checkpoint will say
            block.layers[name.removesuffix(".weight")].weight.copy_(weight)
        return found

    with runner:
        for _ in runner.run(work):
            pass


def read(scratch: Path, name: str) -> torch.Tensor:
    """Returns a pruned weight that `prune_blocks` wrote."""
    with safe_open(blockwise.result(scratch, block_of(name)), "pt") as file:
        return file.get_tensor(name)
