"""The windows that a student learns from, and those that it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.errors import InputError
from trimtab.recipe import Distillation
from trimtab.runtime import text

#: One window in this many is held out, within these bounds.
ONE_HELD_OUT_IN = 20
LEAST_HELD_OUT, MOST_HELD_OUT = 4, 32


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, int64 [windows, length]: no token of one is in the other."""

    heldout: torch.Tensor
    training: torch.Tensor

    @property
    def all(self) -> torch.Tensor:
        """The held-out windows, then those for training: the order in which a teacher's logits are stored."""
        return torch.cat([self.heldout, self.training])


def read(tokenizer: Any, sources: Sequence[str], length: int, generated: Path | None = None) -> Windows:
    """Cuts the texts of all sources into windows; of every twenty, one is held out, spread evenly over the texts.

    Each window begins as the tokenizer begins a text, with BOS where it writes one.

    Windows of text that the teacher generated are trained on besides; where there is no other text, some of them are
    held out.

    Args:
        sources: "builtin", or files of text, in the order in which they are read.
        generated: the folder of a stage `generate`, or None.

    Raises:
        InputError: a file that is not there, not text or empty, or too little text for the held-out windows and one
            more; names `distill.text`.
    """
    found = [text.read_text(s, text.CALIBRATION_TEXT, tokenizer, "distill.text") for s in sources]
    tokens = text.encode(tokenizer, text.SEPARATOR.join(found), special=False) if found else []
    extra = load_file(generated / "generated.safetensors")["tokens"].long() if generated else None
    if found:
        windows = _cut(tokenizer, tokens, length)
    else:
        windows, extra = extra, None
    if len(windows) < LEAST_HELD_OUT + 1:
        raise InputError(
            f"distill.text: {len(tokens):,} tokens give {len(windows)} windows of {length}, {LEAST_HELD_OUT} are held "
            f"out and one more is needed; give more text or a shorter length"
        )
    count = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, len(windows) // ONE_HELD_OUT_IN))
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[torch.arange(count) * len(windows) // count] = True
    training = windows[~held] if extra is None else torch.cat([windows[~held], extra])
    return Windows(windows[held], training)


def _cut(tokenizer: Any, tokens: list[int], length: int) -> torch.Tensor:
    """Returns all windows of the text, int64 [windows, length], each begun as the tokenizer begins a text."""
    room = length - len(text.prefix(tokenizer))
    rows = torch.tensor(tokens, dtype=torch.int64)
    return text.begin(tokenizer, text.cut(rows, room, len(rows) // room))


class Batches:
    """The batches of a training: every step's is a function of the step alone, so resume is exact.

    Windows are shuffled anew in each epoch with the recipe's seed; an epoch's last ones that fill no batch are left
    out.

    Raises:
        InputError: fewer windows than a batch has.
    """

    def __init__(self, windows: torch.Tensor, settings: Distillation):
        self.windows, self.seed, self.size = windows, settings.seed, settings.batch_size
        if len(windows) < self.size:
            raise InputError(
                f"distill.batch_size: {len(windows)} windows of {settings.length} tokens are left for training, fewer "
                f"than {self.size}; write at most {len(windows)}, or give more text or a shorter length"
            )
        self.tokens_per_step = self.size * settings.length
        self.steps = max(1, round(settings.tokens / self.tokens_per_step))
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def places(self, step: int) -> torch.Tensor:
        """Returns which windows are a step's batch, int64 [batch_size]."""
        epoch, position = divmod(step * self.size, len(self.windows) // self.size * self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.windows), generator=generator)
        return self._order[position : position + self.size]
