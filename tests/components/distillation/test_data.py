"""Windows: what is held out is not trained on, and a batch is a function of the step."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from trimtab.base.errors import InputError
from trimtab.components.distillation.text import data
from trimtab.recipe import Distillation
from trimtab.runtime.checkpoint.model_files import load_tokenizer

from .conftest import SETTINGS


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return data.read(tokenizer, ["builtin"], 32)


def rows(windows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(window.tolist()) for window in windows}


def test_one_window_in_twenty_is_held_out(windows):
    assert len(windows.heldout) == 32 and len(windows.all) > 20 * 32  # as many as are ever held out
    assert not rows(windows.heldout) & rows(windows.training)


def test_a_mix_of_texts_is_read_one_behind_the_other(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} of it. " * 100)
    both = data.read(tokenizer, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], 32)
    words = tokenizer.batch_decode(both.training)
    assert "The a of it." in words[0] and "The b of it." in words[-1]


def test_generated_text_is_for_training(tokenizer, windows, tmp_path):
    tokens = torch.arange(10 * 32, dtype=torch.int32).reshape(10, 32)
    save_file({"tokens": tokens}, tmp_path / "generated.safetensors")
    found = data.read(tokenizer, ["builtin"], 32, tmp_path)
    assert torch.equal(found.heldout, windows.heldout)
    assert torch.equal(found.training, torch.cat([windows.training, tokens.long()]))
    alone = data.read(tokenizer, [], 32, tmp_path)
    assert len(alone.heldout) == 4 and rows(alone.all) == rows(tokens)


def test_batches_are_a_function_of_the_step(windows):
    batches = data.Batches(windows.training, Distillation(**SETTINGS))
    per_epoch = len(windows.training) // 4
    first = torch.cat([batches.places(step) for step in range(per_epoch)])
    assert len(first.unique()) == 4 * per_epoch  # no window twice in an epoch
    assert torch.equal(batches.places(3), first[12:16])
    assert not torch.equal(batches.places(0), batches.places(per_epoch))
    assert batches.steps == 6


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (3, {}, "distill.text: .* tokens give . windows of 32, 4 are held out and one more is needed; give more text"),
        (100, {"batch_size": 64}, "distill.batch_size: .* windows of 32 tokens are left for training, fewer than 64"),
    ],
)
def test_too_little_text(words, settings, message, tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words. " * words)
    with pytest.raises(InputError, match=message):
        data.Batches(data.read(tokenizer, [str(path)], 32).training, Distillation(**SETTINGS | settings))


def test_conversations_are_written_with_the_chat_template(model, tmp_path):
    tokenizer = load_tokenizer(model)
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Where is the mill?"}]}\n' * 100)
    with pytest.raises(InputError, match="distill.text: line 1 of .* the model's tokenizer has no chat template"):
        data.read(tokenizer, [str(path)], 32)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert "<user>Where is the mill?" in tokenizer.decode(data.read(tokenizer, [str(path)], 32).training.flatten())
