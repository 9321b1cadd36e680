"""One block of a model with its weights in place, and the text that it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.base.errors import Failure
from trimtab.families.fusion import Group, groups
from trimtab.runtime.checkpoint import experts
from trimtab.runtime.measure import observe
from trimtab.runtime.measure.activations import Activations
from trimtab.runtime.measure.block_calls import Reached

if TYPE_CHECKING:
    from trimtab.runtime.measure.blockwise import Runner

#: Inputs of a layer, [..., in] -> what the product sees of them, in the same units and of the same type.
Rounding = Callable[[torch.Tensor], torch.Tensor]


class Block:
    """One block of a model with its weights in place, and the text that it reads.

    Attributes:
        number, module: which one it is.
        family: its model's.
        tokens: how many the text has.
        layers: its linear layers by their whole names.
        groups: these, in the groups that read the same input.
        mixtures: its experts by the whole name of their module, {} where it has none.
        dense: the block as it is in the checkpoint, whatever is done to `module`; None without a dense stream.
    """

    def __init__(self, runner: Runner, number: int, module: nn.Module):
        self._runner, self.number, self.module = runner, number, module
        self.family, self.tokens = runner.family, runner.tokens
        self.prefix = f"{runner.family.blocks}.{number}."
        self.layers = observe.linears(runner.model, [number])
        self.dense = copy.deepcopy(module) if "dense" in runner.streams else None
        self._ahead: Activations | None = None
        self._has_run = False

    @cached_property
    def groups(self) -> list[Group]:
        return groups(self.layers, self.family.model_type)

    @cached_property
    def mixtures(self) -> dict[str, experts.SeparateExperts]:
        return experts.mixtures(self.module, self.prefix.removesuffix("."))

    def hidden(self, number: int, stream: str = "hidden") -> torch.Tensor:
        """Returns what the block reads of a batch, on the device."""
        return self._runner.streams[stream][number]

    def run(self) -> None:
        """Runs the block on all of the text, for what is watched meanwhile."""
        for number in range(len(self._runner.batches)):
            self._runner.calls(self.module, self.number, self.hidden(number))

    def advance(self, keep_inputs: bool = False, tell: Callable[[int], None] = lambda number: None) -> None:
        """Runs the block on all of the text; what comes out the next block reads.

        Args:
            keep_inputs: so that `run` can still be called, which takes the memory of as many hidden states again.
            tell: is called with the number of each batch before it runs.
        """
        ahead = self._ahead = self._runner.room() if keep_inputs else None
        stream = self._runner.streams["hidden"]
        for number in range(len(stream)):
            tell(number)
            (ahead or stream)[number] = self._runner.calls(self.module, self.number, stream[number])
        self._has_run = True

    def inputs(self, layer: str, beside: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields what a linear layer reads of each batch, and what it reads in the dense stream, if there is one.

        Args:
            beside: whether the dense stream is run.

        A block runs no further than to that layer. It must be one that every token is given to.

        Raises:
            Failure: `unsupported`, the block multiplies by its weight without calling it.
        """
        for number in range(len(self._runner.batches)):
            found = self._input(self.module, layer, self.hidden(number))
            dense = self.dense if beside else None
            yield found, dense and self._input(dense, layer, self.hidden(number, "dense"))

    def replace(self, layer: str, weight: torch.Tensor, reads: Rounding | None = None) -> None:
        """Puts another weight into a linear layer, and has it read what rounding leaves of its input: so what comes out
        of the block is that of the model as changed so far.

        Args:
            weight: [out, in].
            reads: inputs [..., in] -> what the product sees of them; None where it sees them as they are.
        """
        module = self.layers[layer]
        module.weight.copy_(weight)
        if reads is not None:
            module.register_forward_pre_hook(lambda _, args: (reads(args[0]), *args[1:]))

    def order(self) -> dict[str, int]:
        """Returns the linear layers in the order in which the first batch calls them; an expert that is given none of
        it is not among them."""
        called: dict[str, int] = {}

        def arrive(_: nn.Module, __: tuple[Any, ...], name: str) -> None:
            called.setdefault(name, len(called))

        handles = [m.register_forward_pre_hook(partial(arrive, name=n)) for n, m in self.layers.items()]
        try:
            self._runner.calls(self.module, self.number, self.hidden(0))
        finally:
            for handle in handles:
                handle.remove()
        return called

    def close(self) -> None:
        """Makes what came out of the block, in both streams, what the next one reads."""
        if not self._has_run:
            self.advance()
        if self._ahead is not None:
            self._runner.streams["hidden"] = self._ahead
        if self.dense is not None:
            stream = self._runner.streams["dense"]
            for number in range(len(stream)):
                stream[number] = self._runner.calls(self.dense, self.number, stream[number])

    def _input(self, module: nn.Module, layer: str, hidden: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def arrive(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise Reached

        handle = module.get_submodule(layer.removeprefix(self.prefix)).register_forward_pre_hook(arrive)
        try:
            self._runner.calls(module, self.number, hidden)
        except Reached:
            pass
        finally:
            handle.remove()
        if not found:
            raise Failure("unsupported", f"{layer} is not called by its block, so its input is not seen; exclude it")
        return found[0]
