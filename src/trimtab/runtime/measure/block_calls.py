"""What a model gives its blocks beside the hidden states: masks, positions and the like, recorded and given again.

They are recorded from a run of the model in which blocks do nothing. That they can be given again is tried: with
another text, and in batches of each size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.families import NoAttention
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.measure import observe


class NotByBlock(Failure):
    """A model that cannot be run a block at a time; the reason is a clause that says why."""

    def __init__(self, reason: str):
        super().__init__("unsupported", reason)


class Reached(Exception):
    """As much of the model has run as is needed."""


#: How blocks return hidden states: as they are, in a tuple, or with the weights of attention (Bamba).
_FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None))


class _Call(NamedTuple):
    """What a block is given beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockCalls:
    """Calls the blocks of a model as the model calls them.

    Args:
        model: what stands outside of blocks must have its weights in place for `record` and `head`.
        caches: each block is given a KV cache, which is made by `new_cache` and forgotten behind it.
    """

    def __init__(self, model: PreTrainedModel, caches: bool = False):
        self._model, self._blocks = model, observe.blocks(model)
        self.new_cache: Callable[[], Cache] = partial(DynamicCache, config=model.config)
        self._caches = caches and not isinstance(family_of(model).attention, NoAttention)
        #: By the shape of a batch, [n, length], and the number of a block.
        self._calls: dict[torch.Size, list[_Call]] = {}
        self._returns = _FORMS[0]

    def __call__(self, module: nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what a module makes of the hidden states of a batch, called as the block of that number is."""
        args, kwargs = self._calls[hidden.shape[:2]][number]
        args, kwargs = [self._fresh(x) for x in args], {name: self._fresh(x) for name, x in kwargs.items()}
        output = module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, windows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of windows behind whose last block these hidden states are."""
        with self._stubs(lambda number, args, kwargs: hidden):
            return self._model(windows, use_cache=False).logits

    def last_hidden(self, windows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what the output head reads, [n, length, hidden_size], of windows as for `head`."""
        with self._stubs(lambda number, args, kwargs: hidden):
            return self._model.base_model(windows, use_cache=False).last_hidden_state

    @contextmanager
    def without_blocks(self) -> Iterator[None]:
        """Lets the model run as if it had no blocks, while the body runs it."""
        with self._stubs(lambda number, args, kwargs: args[0] if args else kwargs["hidden_states"]):
            yield

    def record(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields what the first block reads of each batch, and records what all blocks are given beside it.

        Args:
            batches: windows of tokens, int64 [n, length] each.

        Raises:
            NotByBlock: blocks read more than what the one before returned and what is the same for every text.
        """
        if getattr(self._model.config, "num_kv_shared_layers", 0):
            raise NotByBlock("its last blocks read the keys and values of others")
        self._find_form(batches[0])
        for windows in batches:
            known = self._calls.get(windows.shape)
            hidden, calls = self._record(windows, only_first=known is not None)
            if known is None:
                self._calls[windows.shape] = calls
            elif not _alike(calls, known[:1]):
                raise NotByBlock("its blocks are given something that depends on the text")
            yield hidden
        _, calls = self._record(batches[0].flip(-1))  # another text, through all blocks
        if not _alike(calls, self._calls[batches[0].shape]):
            raise NotByBlock("its blocks are given something that depends on the text")

    def _find_form(self, windows: torch.Tensor) -> None:
        """Tries in which form the model takes what a block returns."""
        reasons: list[NotByBlock] = []
        for self._returns in _FORMS:
            try:
                self._record(windows)
                return
            except NotByBlock as reason:
                reasons.append(reason)
            except ValueError:  # the model unpacks more than it is given
                reasons.append(NotByBlock("its blocks return more than hidden states"))
        raise reasons[0]

    def _record(self, windows: torch.Tensor, only_first: bool = False) -> tuple[torch.Tensor, list[_Call]]:
        """Runs the model with blocks that do nothing; returns what the first one reads, and what each is given."""
        calls: list[_Call] = []
        entered: list[torch.Tensor] = []

        def stub(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            if number != len(calls):
                raise NotByBlock("its blocks do not run once each, in their order")
            if number and not _is_same(hidden, entered[-1]):
                raise NotByBlock(f"its block {number} does not read what the block before it returned")
            calls.append(_Call(tuple(rest), kwargs))
            if only_first:
                entered.append(hidden)
                raise Reached
            entered[1:] = [torch.zeros_like(hidden)]
            if not number:
                entered.insert(0, hidden)
            return entered[-1]

        with self._stubs(stub):
            try:
                if self._caches:
                    self._model.base_model(windows, past_key_values=self.new_cache(), use_cache=True)
                else:
                    self._model.base_model(windows, use_cache=False)
            except Reached:
                pass
        if not only_first and len(calls) != len(self._blocks):
            raise NotByBlock("its blocks do not run once each, in their order")
        return entered[0], calls

    @contextmanager
    def _stubs(self, stub: Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]) -> Iterator[None]:
        """Puts something in the place of every block's computation while the body runs the model."""

        def forward(*args: Any, number: int, **kwargs: Any) -> Any:
            return self._returns(stub(number, args, kwargs))

        for number, block in enumerate(self._blocks):
            block.forward = partial(forward, number=number)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    def _fresh(self, value: Any) -> Any:
        return self.new_cache() if isinstance(value, Cache) else value


def _is_same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and (one.data_ptr(), one.shape) == (other.data_ptr(), other.shape)


def _alike(one: Any, other: Any) -> bool:
    """Whether blocks are given the same; a cache is none of the text's, for each block gets one of its own."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Cache):
        return isinstance(other, Cache)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    return one is other or bool(one == other)
