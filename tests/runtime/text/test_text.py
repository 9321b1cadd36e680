"""Text as tokens: whatever is calibrated on, trained on, judged or served begins as its tokenizer begins a text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from trimtab.base.errors import InputError
from trimtab.components.calibration import data as calibration
from trimtab.components.distillation.text import data as distillation
from trimtab.components.distillation.text import generation
from trimtab.components.validation.evaluation import measure
from trimtab.components.validation.evaluation.generation import PROMPTS, generate
from trimtab.recipe import Calibration
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.runtime.text import token_windows

SENTENCE = tiny.SENTENCES[0]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Whether it writes BOS -> the tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    return {adds: load_tokenizer(tiny.write_model(folder / str(adds), adds_bos=adds)) for adds in (True, False)}


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def tokenizer(tokenizers: dict[bool, Any], request: pytest.FixtureRequest) -> Any:
    return tokenizers[request.param]


@pytest.fixture
def begins(tokenizer: Any, tokenizers: dict[bool, Any]) -> list[int]:
    """The tokens that stand before every text."""
    return [tokenizer.bos_token_id] if tokenizer is tokenizers[True] else []


def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer, begins):
    bare = token_windows.encode(tokenizer, SENTENCE, special=False)
    assert tokenizer.decode(bare) == SENTENCE
    assert token_windows.encode(tokenizer, SENTENCE) == begins + bare and token_windows.prefix(tokenizer) == begins
    assert token_windows.encode(tokenizer, "") == begins


def test_a_text_that_has_its_bos_gets_no_second(tokenizer):
    bare = token_windows.encode(tokenizer, SENTENCE, special=False)
    for special in (True, False):
        assert token_windows.encode(tokenizer, f"<s>{SENTENCE}", special) == [tokenizer.bos_token_id, *bare]


def test_windows_of_perplexity(tokenizer, begins):
    content = " ".join(tiny.SENTENCES * 20)
    windows = token_windows.windows(tokenizer, content, 32, 8)
    assert windows.shape == (8, 32) and (windows[:, : len(begins)] == torch.tensor(begins)).all()
    assert content.startswith(tokenizer.decode(windows[:, len(begins) :].flatten())), "no token of it is left out"


def test_calibration(tokenizer, begins):
    sample = calibration.draw(Calibration(samples=6, length=32), tokenizer)
    assert sample.tokens.shape == (6, 32) and (sample.tokens[:, : len(begins)] == torch.tensor(begins)).all()
    assert "<s>" not in sample.text, "what is compared with the evaluation's text is text"


def test_distillation_and_what_a_teacher_goes_on_from(tokenizer, begins):
    found = distillation.read(tokenizer, ["builtin"], 32)
    prompts = generation._prompts(tokenizer, ["builtin"], 32, 10, seed=0)
    for tokens in (found.heldout, found.training, prompts):
        assert (tokens[:, : len(begins)] == torch.tensor(begins)).all()
        assert not (tokens[:, len(begins) :] == tokenizer.bos_token_id).any(), "a window has one beginning"
    assert found.training.shape[1] == 32 and prompts.shape == (10, len(begins) + 8)


def test_what_an_engine_writes_after(tokenizer, begins):
    echo = SimpleNamespace(tokenizer=tokenizer, generate=lambda prompts, max_new_tokens: prompts)
    assert generate(echo) == {p: begins + token_windows.encode(tokenizer, p, special=False) for p in PROMPTS}


def evaluated(tokenizer: Any, folder: Path, sentences: int, span: list[int], asked: int) -> tuple[int, torch.Tensor]:
    path = folder / "heldout.txt"
    path.write_text(" ".join(tiny.SENTENCES * sentences))
    parameters = {"window_tokens": 32, "all_windows": asked, "windows": span, "heldout": str(path)}
    return measure._windows(SimpleNamespace(tokenizer=tokenizer), parameters)


def test_where_a_text_gives_fewer_windows_each_look_gets_its_share(tokenizer, begins, tmp_path):
    """A larger vocabulary makes fewer tokens of the same text; a run may not end after acceptance for it."""
    start, whole = evaluated(tokenizer, tmp_path, 20, [0, 10], 10)
    text = (tmp_path / "heldout.txt").read_text()
    there = len(token_windows.encode(tokenizer, text, special=False)) // (32 - len(begins))
    assert start == 0 and len(whole) == 10 < there
    asked = there + there // 2
    first, second = ([0, asked // 2], [asked // 2, asked])
    start, windows = evaluated(tokenizer, tmp_path, 20, first, asked)
    later, others = evaluated(tokenizer, tmp_path, 20, second, asked)
    assert start == 0 and later == len(windows) and len(windows) + len(others) == there
    assert len(windows) == pytest.approx(there / 2, abs=1)
    with pytest.raises(InputError, match=rf"heldout: [\d,]+ tokens give {there} windows of 32, and {3 * there} are"):
        evaluated(tokenizer, tmp_path, 20, [0, 10], 3 * there)
