"""Carries text through a model a block at a time: hidden states in, hidden states out, the next weights read meanwhile.

Memory holds one block, the next one on its way, and the hidden states between two blocks (`activations`). Each block is
called as the model itself calls it: its masks, positions and the like are recorded from a run of the model in which
blocks do nothing.

**Which models go so**: those in which a block reads what the block before it returned, and beside it nothing that
depends on the text or on another block: with windows, recurrent blocks and experts among them. Whether that is so is
tried; a model with a stream of its own into each block (Gemma 3n) or blocks that read the keys of others is not run,
and whoever can measures it whole instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from trimtab.base import progress
from trimtab.families.fusion import block_of
from trimtab.runtime.checkpoint import skeleton
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.measure import observe
from trimtab.runtime.measure.activations import Activations
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import BlockCalls
from trimtab.runtime.measure.block_weights import BlockWeights

#: The least time between two writings of hidden states into the scratch, in units of what the last one took.
PAUSE_OVER_WRITE = 4


class Runner:
    """A checkpoint and the text that it is run on.

    Args:
        checkpoint: a plain one.
        tokens: int64 [samples, length]; or batches of it, in which windows may have other lengths.
        stage, title: whose progress it is, and what is done.
        scratch: what is finished waits there, and is found after a kill; None keeps nothing.
        caches: blocks are given a KV cache each, see `BlockCalls`.
        with_dense: a second stream runs through the blocks as they are in the checkpoint, whatever is done to those
            that the first one runs through; see `Block.inputs`.
        windows_at_once: of a batch; as `observe.batches` has it if absent.
        model: the checkpoint's skeleton, in the type that is computed in, where there is one already.

    Raises:
        NotByBlock: see the head of this file.
        InputError: a weight is missing, or holds NaN or infinity.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokens: torch.Tensor | Sequence[torch.Tensor],
        stage: str,
        title: str,
        scratch: Path | None = None,
        caches: bool = False,
        with_dense: bool = False,
        windows_at_once: int | None = None,
        model: PreTrainedModel | None = None,
    ):
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = model or skeleton.skeleton(checkpoint, torch.bfloat16 if gpu else torch.float32)
        self.model.eval().requires_grad_(False)
        self.family, self.blocks = family_of(self.model), observe.blocks(self.model)
        self._stage, self._title = stage, title
        self.calls = BlockCalls(self.model, caches)
        self._scratch, self._last_write = scratch, (-math.inf, 0.0)
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.split(windows_at_once or len(observe.batches(self.device, tokens)[0]))
        self.batches = [windows.to(self.device) for windows in tokens]
        self.tokens = sum(windows.numel() for windows in self.batches)
        self.weights = BlockWeights(self.model, checkpoint, self.device, self.model.dtype)
        self.streams = {"hidden": self._enter()}
        if with_dense:
            self.streams["dense"] = self.room()
            for number in range(len(self.batches)):
                self.streams["dense"][number] = self.streams["hidden"][number]

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.close()

    def run(
        self, work: Callable[[Block], Mapping[str, torch.Tensor]], through: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Calls the work with each block while its weights are in place, and yields what it returns, on the CPU.

        What the block then computes, also with weights that the work has changed, the next block reads. Finished blocks
        and, at times, what the next one reads are written to the scratch: a kill costs what came behind.

        Args:
            through: the last block is run too, though no other reads what comes out of it.
        """
        total, begin = len(self.blocks), self._resume()
        for number in range(begin):
            yield load_file(self._path("block", number))
        for number in range(begin, total):
            progress.report(self._stage, self._title, number, total)
            is_last = number + 1 == total
            with self.weights.block(number, None if is_last else number + 1) as module:
                block = Block(self, number, module)
                found = {name: tensor.cpu().contiguous() for name, tensor in work(block).items()}
                if through or not is_last:
                    block.close()
                del block  # and with it the copy that the dense stream runs through
            self._write(self._path("block", number), found)
            if not is_last:
                self._keep_inputs(number + 1)
            yield found
        progress.report(self._stage, self._title, total, total)

    def backward(self) -> Iterator[Block]:
        """Yields the blocks from the last to the first, each with its weights in place."""
        for number in reversed(range(len(self.blocks))):
            with self.weights.block(number, number - 1 if number else None) as module:
                yield Block(self, number, module)

    def _enter(self) -> Activations:
        entered: Activations | None = None
        with torch.no_grad(), self.weights.outside():
            for number, hidden in enumerate(self.calls.record(self.batches)):
                if entered is None:
                    self._channels, self._dtype = hidden.shape[2:], hidden.dtype
                    entered = self.room()
                entered[number] = hidden
        return entered

    def room(self) -> Activations:
        """Returns room for the hidden states of all batches."""
        shapes = [torch.Size((*windows.shape, *self._channels)) for windows in self.batches]
        return Activations(shapes, self._dtype, self.device, self._scratch)

    # --- what is kept for after a kill --------------------------------------------------------------------------

    def _path(self, what: str, number: int) -> Path | None:
        return self._scratch and _file(self._scratch, what, number)

    def _resume(self) -> int:
        """Returns the first block to run, and takes what it reads from the scratch."""
        if self._scratch is None:
            return 0
        total = len(self.blocks)
        done = next((n for n in range(total) if not self._path("block", n).exists()), total)
        if done == total:
            return total
        begin = next((n for n in range(done, 0, -1) if self._path("inputs", n).exists()), 0)
        if begin:
            kept = load_file(self._path("inputs", begin))
            for name, stream in self.streams.items():
                stream.fill(name, kept)
        return begin

    def _keep_inputs(self, number: int) -> None:
        ended, cost = self._last_write
        started = time.monotonic()
        if self._scratch is None or started - ended < PAUSE_OVER_WRITE * cost:
            return
        found = {key: t for name, stream in self.streams.items() for key, t in stream.tensors(name).items()}
        self._write(self._path("inputs", number), found)
        for older in self._scratch.glob("inputs-*.safetensors"):
            if older < self._path("inputs", number):
                older.unlink()
        self._last_write = time.monotonic(), time.monotonic() - started

    def _write(self, path: Path | None, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a file that is there as a whole or not at all."""
        if path is not None:
            partial_path = path.with_suffix(".partial")
            save_file(dict(tensors), partial_path)
            partial_path.replace(path)


def result(scratch: Path, number: int) -> Path:
    """Returns the file in a runner's scratch that holds what the work returned for a block."""
    return _file(scratch, "block", number)


def drop(scratch: Path, names: Sequence[str]) -> None:
    """Removes the results of the blocks of tensors of these names, where there are any."""
    for number in {block_of(name) for name in names} - {None}:
        result(scratch, number).unlink(missing_ok=True)


def _file(scratch: Path, what: str, number: int) -> Path:
    return scratch / f"{what}-{number:05d}.safetensors"
