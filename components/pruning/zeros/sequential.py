"""Runs a model a block at a time, and prunes each block before the next one sees what comes out of it.

Memory holds one block, its Gram matrices and the activations between two blocks. Each finished block and what it
hands on are written to the scratch folder, so a kill costs the open block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.families.fusion import block_of, groups
from trimtab.runtime.checkpoint import experts
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.checkpoint.skeleton import family_of, skeleton
from trimtab.runtime.measure import observe, routing

#: (the names and weights of layers that share an input, its Gram matrix) -> their pruned weights.
Prune = Callable[[Mapping[str, torch.Tensor], torch.Tensor], Mapping[str, torch.Tensor]]


@torch.inference_mode()
def prune_blocks(checkpoint: Path, tokens: torch.Tensor, layers: Sequence[str], scratch: Path, prune: Prune) -> None:
    """Writes the pruned weights of each block into the scratch folder, where `read` finds them.

    Activations are float32 on a CPU, bfloat16 on a GPU; Gram matrices are sums of x xᵀ over all tokens, in float32.

    Args:
        checkpoint: a plain checkpoint.
        tokens: what the model is run on, int64 [samples, length].
        layers: the linear layers to prune.
        scratch: what an earlier try left there is used.

    Raises:
        InputError: a weight that is not finite.
        Failure: `unsupported`, activations that are not finite, or a model that transformers builds of other parts
            than its files hold.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    run = _Run(checkpoint, tokens, layers)
    total = len(run.blocks)
    done = next(number for number in range(total + 1) if number == total or not _pruned(scratch, number).exists())
    if 0 < done < total:
        run.hidden = load_file(_inputs(scratch, done))["hidden"].to(run.device)
    for number in range(done, total):
        progress.report("prune", "pruning blocks", number, total)
        weights = run.prune_block(number, prune)
        if number + 1 < total:
            _write({"hidden": run.hidden}, _inputs(scratch, number + 1))
        _write(weights, _pruned(scratch, number))
        _inputs(scratch, number).unlink(missing_ok=True)
    progress.report("prune", "pruning blocks", total, total)


def read(scratch: Path, name: str) -> torch.Tensor:
    """Returns a pruned weight that `prune_blocks` wrote."""
    with safe_open(_pruned(scratch, block_of(name)), "pt") as file:
        return file.get_tensor(name)


def _pruned(scratch: Path, block: int) -> Path:
    return scratch / f"block-{block:05d}.safetensors"


def _inputs(scratch: Path, block: int) -> Path:
    return scratch / f"inputs-{block:05d}.safetensors"


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


class _Run:
    """A model whose parameters stay on disk, and what the next block reads: `hidden`, [samples, length, hidden]."""

    def __init__(self, checkpoint: Path, tokens: torch.Tensor, layers: Sequence[str]):
        gpu = torch.cuda.is_available()
        self.device, self.dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
        self.model = skeleton(checkpoint).eval()
        self.blocks = observe.blocks(self.model)
        self.family = family_of(self.model)
        self.prefix = self.family.blocks
        self.layers, self.export = layers, Export(checkpoint)
        self.hidden, self.arguments = self._enter(tokens)

    def prune_block(self, number: int, prune: Prune) -> dict[str, torch.Tensor]:
        """Prunes a block, moves `hidden` behind it, and returns its weights as the checkpoint stores them."""
        block = self._load(number)
        linears = {layer: self._linear(block, layer) for layer in self.layers if block_of(layer) == number}
        shared = [group.layers for group in groups(linears, self.family.model_type)]
        sums = self._grams(block, number, {names[0]: linears[names[0]] for names in shared})
        observe.check_finite({f"{name}.gram": gram for name, gram in sums.items()})
        found: dict[str, torch.Tensor] = {}
        for names in shared:
            for name, weight in prune({n: linears[n].weight for n in names}, sums[names[0]]).items():
                found[f"{name}.weight"] = stored = weight.to(self.export.view(f"{name}.weight").dtype)
                linears[name].weight.copy_(stored)  # the next block sees what the checkpoint will say
        if number + 1 < len(self.blocks):
            self.hidden = torch.cat(list(self._outputs(block, number)))
        return found

    def _grams(self, block: nn.Module, number: int, first: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Sums over the inputs of layers; of experts that no token was given to, over every token (`routing`)."""

        def run(layers: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
            with observe.grams(layers) as sums:
                for _ in self._outputs(block, number):
                    pass
            return sums

        sums = run(first)
        unseen = {name: layer for name, layer in first.items() if self.family.is_expert(name) and not sums[name].any()}
        if unseen:
            numbers = sorted({int(self.family.expert(name)[0]) for name in unseen})
            (mixture,) = experts.mixtures(block)
            with routing.run_on_all(block, {mixture: numbers}):
                sums |= run(unseen)
        return sums

    def _outputs(self, block: nn.Module, number: int) -> Any:
        args, kwargs = self.arguments[number]
        for hidden in self.hidden.split(8 if self.device.type == "cuda" else 1):
            output = block(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def _enter(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[tuple[Any, Any]]]:
        """Returns what the first block reads, and the other arguments of every block: masks, positions.

        The arguments are those of one window; they are the same for all, for all have one length and no padding.
        """
        head, config = f"{self.family.head}.", self.model.config.to_dict()
        names = [name for name in self.export.names if block_of(name) is None and not name.startswith(head)]
        names = [name for name in names if not self.family.is_beside(name, config)]
        self._assign(self.model, {name: self._tensor(name).to(self.dtype) for name in names})
        seen: dict[int, tuple[Any, Any]] = {}
        first: list[torch.Tensor] = []

        def record(number: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if number == 0:
                    first.append(hidden_states)
                seen[number] = (args, kwargs)
                return first[-1]

            return forward

        for number, block in enumerate(self.blocks):
            block.forward = record(number)
        for window in tokens:
            self.model.base_model(window[None], use_cache=False)
        for block in self.blocks:
            del block.forward
        arguments = send_to_device([seen[number] for number in range(len(self.blocks))], self.device)
        return torch.cat(first).to(self.device), arguments

    def _load(self, number: int) -> nn.Module:
        """A copy of the block with its parameters in memory."""
        prefix = f"{self.prefix}.{number}."
        names = [name for name in self.export.names if name.startswith(prefix)]
        block = copy.deepcopy(self.blocks[number])
        weights = {n: self._tensor(n).to(self.device, self.dtype, copy=True) for n in names}
        self._assign(block, {name.removeprefix(prefix): weight for name, weight in weights.items()})
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise self._other_parts(prefix + name)
        return block.to(self.device)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self.export.view(name)
        check_finite(name, tensor)
        return tensor

    def _assign(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        module.load_state_dict(weights, strict=False, assign=True)

    def _linear(self, block: nn.Module, layer: str) -> nn.Linear:
        place = layer.removeprefix(f"{self.prefix}.{block_of(layer)}.")
        found = dict(block.named_modules()).get(place)
        if not isinstance(found, nn.Linear):
            raise self._other_parts(layer)
        return found

    def _other_parts(self, name: str) -> Failure:
        what = f"sparsegpt cannot run this {self.family.model_type} model a block at a time"
        return Failure("unsupported", f"prune.method: {what}: {name} is not what its files hold; write wanda")
