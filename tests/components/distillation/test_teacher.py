"""What a teacher says, stored: its text and its logits, found again after a kill."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from trimtab.base.errors import Failure, InputError
from trimtab.components.distillation.objective import teacher
from trimtab.components.distillation.objective.teacher import StoredLogits
from trimtab.components.distillation.text import data, generation
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.model_files import load_tokenizer

GENERATE = {"text": ["builtin"], "length": 32, "generate": 40 * 32, "seed": 0}
TEACH = {"text": ["builtin"], "length": 32, "temperature": 2.0, "stored_logits": 8}


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


def kill_after(count, monkeypatch, module, name):
    """Lets a function work so often, then kills."""
    work, calls = getattr(module, name), []

    def counted(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise Killed
        return work(*arguments)

    monkeypatch.setattr(module, name, counted)


def generate(model, folder, name="generated", **settings):
    output = folder / name
    output.mkdir()
    metrics = generation.generate(str(model), str(output), str(folder / "scratch"), {**GENERATE, **settings})
    return metrics, load_file(output / "generated.safetensors")["tokens"]


@pytest.fixture(scope="module")
def generated(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    metrics, tokens = generate(model, folder)
    assert metrics["windows"] == 40 and metrics["tokens"] == tokens.numel() == 40 * 32
    return folder / "generated"


def test_text_is_a_function_of_the_seed(model, generated, tmp_path, monkeypatch):
    expected = load_file(generated / "generated.safetensors")["tokens"]
    with monkeypatch.context() as patch:
        kill_after(2, patch, generation, "_sample")  # of three batches
        with pytest.raises(Killed):
            generate(model, tmp_path, "killed")
    kill_after(1, monkeypatch, generation, "_sample")
    assert torch.equal(generate(model, tmp_path, "resumed")[1], expected)
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    assert not torch.equal(generate(model, tmp_path / "other", seed=1)[1], expected)


def test_windows_begin_with_text_for_training(model, generated):
    tokens = load_file(generated / "generated.safetensors")["tokens"].long()
    training = data.read(load_tokenizer(model), ["builtin"], 32).training
    starts = {tuple(window[i : i + 8].tolist()) for window in training for i in range(32 - 8 + 1)}
    assert all(tuple(window[:8].tolist()) in starts for window in tokens)
    assert len({tuple(window.tolist()) for window in tokens}) == 40


def test_without_a_text_documents_are_begun(model, tmp_path):
    _, tokens = generate(model, tmp_path, text=[], generate=5 * 32)
    assert (tokens[:, 0] == load_tokenizer(model).bos_token_id).all()
    assert len(data.read(None, [], 32, tmp_path / "generated").heldout) == 4


def test_what_is_finished_in_time_is_kept(model, generated, tmp_path, monkeypatch, capsys):
    """Each look at the clock is a second later: the third batch is under way when the time is over."""
    clock = iter(range(100))
    monkeypatch.setattr(generation.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(generation, "SECONDS_BETWEEN_REPORTS", 0)
    monkeypatch.setattr(generation._Clock, "speed", 7.0)
    monkeypatch.setattr(generation, "TOKENS_BETWEEN_LOOKS", 12)
    output = tmp_path / "some"
    output.mkdir()
    metrics = generation.generate(str(model), str(output), str(tmp_path / "scratch"), GENERATE, seconds=12)
    expected = load_file(generated / "generated.safetensors")["tokens"]
    assert metrics["windows"] == 32
    assert torch.equal(load_file(output / "generated.safetensors")["tokens"], expected[:32])
    told = capsys.readouterr().err
    assert "generate: 7 tokens/s (384/1280)" in told and "ends after 12 s, before all was written" in told


def test_no_time_at_all(model, tmp_path):
    output = tmp_path / "none"
    output.mkdir()
    metrics = generation.generate(str(model), str(output), str(tmp_path / "scratch"), GENERATE, seconds=0)
    assert metrics["windows"] == 0
    found = data.read(load_tokenizer(model), ["builtin"], 32, output)
    assert torch.equal(found.training, data.read(load_tokenizer(model), ["builtin"], 32).training)


def test_tokens_are_drawn_as_often_as_they_are_likely(monkeypatch):
    """0.5, 0.3 and 0.15 of what is left without 0.04 and 0.01, which are less than the least that is drawn."""
    monkeypatch.setattr(generation, "LEAST_PROBABILITY", 0.05)
    logits = torch.tensor([0.3, 0.04, 0.5, 0.15, 0.01]).log().expand(20_000, 5)
    drawn = generation.choose(logits, torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount(minlength=5) / 20_000
    expected = torch.tensor([0.3, 0, 0.5, 0.15, 0]) / 0.95
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_where_no_token_is_likely_the_likeliest_are_drawn(monkeypatch):
    monkeypatch.setattr(generation, "LEAST_PROBABILITY", 0.5)
    logits = torch.tensor([0.4, 0.4, 0.2]).log().expand(100, 3)
    assert generation.choose(logits, torch.Generator().manual_seed(0)).unique().tolist() == [0, 1]


def teach(model, folder, name="logits", trees=(), **settings):
    output = folder / name
    output.mkdir()
    return teacher.teach(str(model), str(output), str(folder / "scratch"), {**TEACH, **settings}, *trees)


@pytest.fixture(scope="module")
def logits(model, generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logits")
    metrics = teach(model, folder, trees=(str(generated),))
    assert metrics["tokens"] == 32 * metrics["windows"] and 0 < metrics["rest"] < 1
    assert metrics["bytes"] == pytest.approx((4 * 8 + 4 + 4) * metrics["tokens"], rel=0.05)
    return folder / "logits"


@pytest.fixture(scope="module")
def windows(model, generated):
    return data.read(load_tokenizer(model), ["builtin"], 32, generated)


def test_stored_is_what_the_teacher_says(model, logits, windows):
    stored = StoredLogits(logits, windows.all, torch.device("cpu"))
    places = torch.tensor([5, 400, len(windows.all) - 1])
    values, indices, rest = stored.rows(places, torch.device("cpu"))
    network, _ = model_files.load(model, torch.float32)
    with torch.no_grad():
        expected = (network(windows.all[places]).logits[:, :-1].flatten(0, 1) / 2.0).log_softmax(-1)
    best, where = expected.topk(8, dim=-1)
    assert torch.equal(indices.long(), where)
    torch.testing.assert_close(values.float(), best, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(rest.exp() + best.exp().sum(-1), torch.ones(len(rest)))


def test_a_kill_costs_one_file(model, logits, generated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(3, patch, teacher, "_logits")
        with pytest.raises(Killed):
            teach(model, tmp_path, "killed", (str(generated),))
    files = sorted(logits.iterdir())
    kill_after(len(files) - 3, monkeypatch, teacher, "_logits")
    teach(model, tmp_path, "resumed", (str(generated),))
    assert [(tmp_path / "resumed" / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]


def test_other_text_has_other_logits(logits, windows):
    with pytest.raises(Failure, match="distill.stored_logits: they were stored for other text than is trained on"):
        StoredLogits(logits, windows.all.flip(0), torch.device("cpu"))


def test_more_tokens_than_there_are(model, tmp_path):
    with pytest.raises(InputError, match="distill.stored_logits: 301 of a vocabulary of 300; write at most 300"):
        teach(model, tmp_path, stored_logits=301)


def test_more_bytes_than_there_are(model, tmp_path, monkeypatch):
    free = teacher.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match="distill.stored_logits: 8 of each of .* tokens take 0.0 GB, and .* has"):
        teach(model, tmp_path)


@pytest.mark.parametrize("stored", [300, 32])
def test_a_student_learns_from_what_is_stored(stored, distill, model, tmp_path, monkeypatch):
    """With the whole vocabulary stored, as from the teacher itself, but for the rounding to float16."""
    (tmp_path / "tree").mkdir()
    teach(model, tmp_path / "tree", temperature=1.0, stored_logits=stored)
    live, _, told = distill("live")
    monkeypatch.setattr(model_files, "load_for_measuring", load_but(model, model_files.load_for_measuring))
    found, _, told_stored = distill("stored", trees=(None, str(tmp_path / "tree" / "logits")), stored_logits=stored)
    if stored == 300:
        assert told_stored["train"] == pytest.approx(told["train"], rel=2e-3)
    else:
        assert all(a < b for a, b in zip(told_stored["train"], told["train"], strict=True))
    assert found["heldout_loss_after"] < found["heldout_loss_before"]


def load_but(teacher_folder, load):
    def loads(folder):
        assert folder != teacher_folder, "the teacher is not needed any more"
        return load(folder)

    return loads
