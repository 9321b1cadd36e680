"""The windows that a student learns from, and those that it is judged on."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.recipe import Distillation
from trimtab.runtime import text

HELDOUT_WINDOWS = 4


class Data:
    """Windows of text: the first are held out, the rest are shuffled by epoch with the recipe's seed.

    Raises:
        InputError: too little text for the held-out windows and one batch.
    """

    def __init__(self, tokenizer: Any, settings: Distillation):
        source = text.read_text(settings.text, text.CALIBRATION_TEXT, tokenizer, "distill.text")
        available = len(tokenizer(source, add_special_tokens=False).input_ids) // settings.length
        least = HELDOUT_WINDOWS + settings.batch_size
        windows = text.windows(tokenizer, source, settings.length, max(available, least))
        self.heldout, self.training = windows[:HELDOUT_WINDOWS], windows[HELDOUT_WINDOWS:]
        self.settings = settings
        self.steps = max(1, round(settings.tokens / (settings.batch_size * settings.length)))

    def batch(self, step: int) -> torch.Tensor:
        """Returns the batch of a step, int64 [batch, length]: a function of the step alone, so resume is exact."""
        size = self.settings.batch_size
        epoch, position = divmod(step * size, len(self.training) // size * size)
        order = torch.randperm(
            len(self.training), generator=torch.Generator().manual_seed(self.settings.seed + epoch)
        )
        return self.training[order[position : position + size]]
