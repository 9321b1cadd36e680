"""How many windows a teacher writes at once: as many as keep no more than their share of memory."""

from __future__ import annotations

import decoders
import pytest
import torch

from trimtab import families
from trimtab.components.distillation.text import generation
from trimtab.runtime.checkpoint import skeleton

#: Of a window of 64 tokens in float32. Two heads of keys and values of 16 numbers in each block with attention; in each
#: delta net the last four inputs of 2 x 16 + 64 channels in 16 bits, and four matrices of 8 x 16 in float32.
KEYS, STATE = 2 * 2 * 16 * 64 * 4, 2 * (2 * 16 + 64) * 4 + 4 * (4 * 8 * 16)


@pytest.mark.parametrize(
    ("model_type", "window"),
    [("llama", 4 * KEYS), ("qwen3_5_text", 2 * KEYS + 2 * STATE), ("mamba", 4 * (2 * 128 * 4 + 4 * 128 * 16))],
)
def test_a_window_takes_what_its_blocks_keep(model_type, window, monkeypatch) -> None:
    with torch.device("meta"):
        model = skeleton.as_stored(decoders.build(model_type), families.named(model_type))
    for windows in (1, 3):
        monkeypatch.setattr(generation, "CACHE_BYTES", (windows + 1) * window - 1)
        assert generation._windows_at_once(model, 64) == windows
