"""Likelihoods of a model that no device holds: a batch of requests goes through it one block at a time.

The weights of one block are on the device, those of the next are read meanwhile, and hidden states wait in host memory
(`runtime.measure.blockwise`). So a pass reads the checkpoint once, for as many requests as the memory has room for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint import config_file, skeleton
from trimtab.runtime.checkpoint.model_files import Export, load_tokenizer
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.decoder import float16_range, head
from trimtab.runtime.engines.scoring import Batch, Inputs, Scoring
from trimtab.runtime.kernels import replacements
from trimtab.runtime.linear import cpu_products
from trimtab.runtime.measure import activations
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.measure.blockwise import Runner

#: Seconds between two reports of the batches of a block.
EVERY = 2.0


class BlockwiseEngine(Scoring):
    """Scores a plain checkpoint in the numbers in which `TorchEngine` computes, and does nothing else.

    What it says equals what `TorchEngine` says up to rounding: every request has a row of its own, and no kernel stands
    in the place of several.

    Args:
        folder: a plain Hugging Face checkpoint.
        settings: `max_seq_len` bounds a sequence, `max_num_tokens` what a block reads at once.

    Raises:
        InputError: not a model folder.
        Failure: `unsupported`, a quantized export; and by the methods `unsupported`, a model that does not go block by
            block, or anything but likelihoods, and `does_not_fit`.
    """

    _share_contexts = False  # a branch's mask belongs to its text, and blocks are given the same for every text

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = Path(folder), settings
        export = Export(self.folder)
        if export.layers or export.kv_cache_algo:
            what = "is quantized, and block by block runs a plain checkpoint alone; open it whole"
            raise Failure("unsupported", f"{folder}: {what}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = skeleton.skeleton(self.folder)
        replacements.cap_scores(self.model)
        self.head = self.model.get_output_embeddings()
        self._behind_head = head.behind(self.model)
        self._is_float16 = config_file.declared_dtype(self.folder) == torch.float16
        self._is_checked = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @cached_property
    def weight_bytes(self) -> int:
        """The most that is held at a time: two blocks, or what stands in none."""
        sizes: Counter[int | None] = Counter()
        for name, parameter in self.model.named_parameters():
            sizes[family_of(self.model).place(name)[0]] += parameter.nbytes
        outside = sizes.pop(None, 0)
        return max(outside, 2 * max(sizes.values(), default=0))

    @property
    def device_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    @property
    def arithmetic(self) -> str:
        return f"{super().arithmetic}, block by block"

    def kernels(self) -> dict[str, dict[str, Any]]:
        """As the protocol says: nothing is quantized."""
        return {}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> NoReturn:
        """Is refused: each token would read the whole checkpoint.

        Raises:
            Failure: `unsupported`.
        """
        raise _likelihoods_alone("writes no text; name tasks of multiple choice")

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> NoReturn:
        """Is refused: it would be the disk's.

        Raises:
            Failure: `unsupported`.
        """
        raise _likelihoods_alone("has no speed; write goal: fit_larger_model, which needs none")

    def close(self) -> None:
        """Nothing to do: no weights are held between two calls."""

    def _hidden_of(
        self, batches: Iterable[Batch], read: Callable[[Batch], Inputs]
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        asked = [(batch, read(batch).tokens) for batch in batches]
        passes = list(self._passes(asked))
        for number, some in enumerate(passes, start=1):
            title = "scoring" if len(passes) == 1 else f"scoring, pass {number} of {len(passes)}"
            hidden = self._pass([tokens for _, tokens in some], title)
            yield from zip((batch for batch, _ in some), hidden, strict=True)

    def _passes(self, asked: Sequence[tuple[Batch, torch.Tensor]]) -> Iterator[list[tuple[Batch, torch.Tensor]]]:
        """Yields as many batches at a time as host memory holds the hidden states of; at least one."""
        each = self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize
        some, size, room = [], 0, activations.host_room()
        for batch, tokens in asked:
            if some and size + tokens.numel() * each > room:
                yield some
                some, size = [], 0
            some.append((batch, tokens))
            size += tokens.numel() * each
        if some:
            yield some

    def _pass(self, batches: list[torch.Tensor], title: str) -> Iterator[torch.Tensor]:
        """Yields the last hidden states of each batch of tokens, all of which go through a block before the next."""
        told = time.monotonic()

        def work(block: Block) -> dict[str, torch.Tensor]:
            def tell(number: int) -> None:
                nonlocal told
                if time.monotonic() - told >= EVERY:
                    told = time.monotonic()
                    progress.report("validate", f"{title}, batches of block {block.number + 1}", number, len(batches))

            cpu_products.use(block.module)
            block.advance(tell=tell)
            return {}

        with self._runner(batches, title) as runner, self._in_its_range():
            for _ in runner.run(work, through=True):
                pass
            with runner.weights.outside(head=True):
                self._check_head(runner)
                for number, tokens in enumerate(runner.batches):
                    yield runner.calls.last_hidden(tokens, runner.streams["hidden"][number])

    def _runner(self, batches: list[torch.Tensor], title: str) -> Runner:
        try:
            return Runner(self.folder, batches, "validate", title, model=self.model)
        except NotByBlock as error:
            what = f"the model cannot be scored block by block: {error.reason}"
            raise Failure("unsupported", f"{what}; write a target that holds it") from None

    def _in_its_range(self) -> AbstractContextManager[None]:
        return float16_range.checked(self.model.base_model) if self._is_float16 else nullcontext()

    def _check_head(self, runner: Runner) -> None:
        if not self._is_checked:
            with runner.calls.without_blocks():
                head.check(self.model)
            self._is_checked = True


def _likelihoods_alone(what: str) -> Failure:
    return Failure("unsupported", f"a model that is scored block by block {what}, or a target that holds it")
