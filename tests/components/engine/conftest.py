"""A tiny model that can be asked, and a server with it, once a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from serving import Running, serving

from trimtab.runtime.checkpoint.model_files import load_tokenizer


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, a chat template, and whole characters."""
    folder = tiny.write_model(tmp_path_factory.mktemp("served") / "tiny")
    _speak_ascii(folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _speak_ascii(folder: Path) -> None:
    """Makes half characters unlikely: text of nothing but them would hide what is lost or told twice."""
    tokenizer, tensors = load_tokenizer(folder), load_file(folder / "model.safetensors")
    broken = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).isprintable()]
    broken += [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    tensors["model.embed_tokens.weight"][broken] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def running(served: Path) -> Iterator[Running]:
    with serving(served) as found:
        yield found
