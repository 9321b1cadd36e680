"""Distillation: the loss by hand, exact resume, divergence, and a gate of its own."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from trimtab.components.distillation import resume, training, work
from trimtab.components.distillation.data import HELDOUT_WINDOWS, Data
from trimtab.components.distillation.loss import distillation_loss
from trimtab.components.pruning.work import prune
from trimtab.errors import Failure, InputError
from trimtab.recipe import Distillation
from trimtab.runtime.checkpoint import load_tokenizer

#: Two tokens, a vocabulary of two; logits that are logarithms of probabilities.
STUDENT = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
TEACHER = torch.tensor([[0.8, 0.2], [0.25, 0.75]]).log()
LABELS = torch.tensor([0, 1])
KL = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)  # of the first token; the second has none
CROSS_ENTROPY = -(math.log(0.5) + math.log(0.75)) / 2
#: At temperature 2, probabilities p become sqrt(p) / sum sqrt(p): 0.8, 0.2 become 2/3, 1/3.
KL_AT_2 = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.5)

SETTINGS = {"tokens": 6 * 4 * 32, "batch_size": 4, "length": 32, "learning_rate": 0.001}


@pytest.mark.parametrize(
    ("temperature", "label_weight", "expected"),
    [
        (1.0, 0.0, KL / 2),
        (1.0, 1.0, CROSS_ENTROPY),
        (1.0, 0.25, 0.75 * KL / 2 + 0.25 * CROSS_ENTROPY),
        (2.0, 0.0, 4 * KL_AT_2 / 2),
    ],
)
def test_loss(temperature, label_weight, expected):
    loss = distillation_loss(STUDENT, TEACHER, LABELS, temperature, label_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_loss_where_student_and_teacher_agree():
    assert distillation_loss(TEACHER, TEACHER, LABELS, 3.0, 0.0).item() == pytest.approx(0, abs=1e-7)


@pytest.fixture(scope="module")
def student(model, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    prune(str(model), str(calibration), str(folder), "", {"method": "depth", "blocks": 2})
    return folder


def distill(student, model, folder, name="run", **settings):
    output = folder / f"{name}-output"
    output.mkdir()
    metrics = work.distill(str(student), str(model), str(output), str(folder / "scratch"), {**SETTINGS, **settings})
    return metrics, load_file(output / "model.safetensors"), json.loads((output / "distillation.json").read_text())


def test_the_student_learns(student, model, tmp_path):
    metrics, weights, log = distill(student, model, tmp_path, tokens=20 * 4 * 32)
    assert metrics["steps"] == len(log["loss"]) == 20
    assert metrics["improved"] == 1 and metrics["heldout_loss_after"] < metrics["heldout_loss_before"]
    assert sum(log["loss"][-5:]) < sum(log["loss"][:5])
    before = load_file(student / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }
    assert not (tmp_path / "scratch").exists()


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


@pytest.mark.parametrize("steps_done", [2, 5])
def test_resume_is_exact(steps_done, student, model, tmp_path, monkeypatch):
    """Killed in the middle and started again gives the weights of an uninterrupted run, bit for bit."""
    monkeypatch.setattr(resume, "TRAINING_OVER_SAVING", 0)
    _, expected, log = distill(student, model, tmp_path, "whole")
    report = training.progress.report

    def kill(stage, text, done=0, total=0):
        report(stage, text, done, total)
        if done == steps_done:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.progress, "report", kill)
        with pytest.raises(Killed):
            distill(student, model, tmp_path, "killed")
    # A kill while a checkpoint is written leaves a partial file, which is not read.
    (tmp_path / "scratch").mkdir(exist_ok=True)
    (tmp_path / "scratch" / "training.partial").write_bytes(b"half")
    metrics, weights, resumed_log = distill(student, model, tmp_path, "resumed")
    assert resumed_log == log and metrics["steps"] == 6
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_divergence_names_the_step(student, model, tmp_path, monkeypatch):
    loss, calls = training.distillation_loss, []

    def broken(*arguments):
        calls.append(1)
        training = len(calls) - HELDOUT_WINDOWS
        return loss(*arguments) * (math.nan if training == 3 else 1)

    monkeypatch.setattr(training, "distillation_loss", broken)
    with pytest.raises(Failure, match="the distillation loss is nan at step 3 of 6; a lower learning_rate") as caught:
        distill(student, model, tmp_path)
    assert caught.value.failure_class == "training_diverged"


def test_a_student_that_became_worse_is_not_kept(student, model, tmp_path):
    metrics, weights, _ = distill(student, model, tmp_path, learning_rate=10.0)
    assert metrics["improved"] == 0
    before = load_file(student / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_too_little_text(student, model, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(InputError, match="give more text, fewer samples or a shorter length"):
        distill(student, model, tmp_path, text=str(tmp_path / "short.txt"))


def test_conversations_are_written_with_the_chat_template(model, tmp_path):
    tokenizer = load_tokenizer(model)
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Where is the mill?"}]}\n' * 100)
    settings = Distillation(**SETTINGS, text=str(path))
    with pytest.raises(InputError, match="distill.text: line 1 of .* the model's tokenizer has no chat template"):
        Data(tokenizer, settings)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert "<user>Where is the mill?" in tokenizer.decode(Data(tokenizer, settings).training[0])


def test_the_work_takes_the_digests_of_its_files(student, model, tmp_path):
    assert distill(student, model, tmp_path, files={"a.txt": "0" * 64})[0]["steps"] == 6


def test_batches_are_a_function_of_the_step(model):
    data = Data(load_tokenizer(model), Distillation(**SETTINGS))
    per_epoch = len(data.training) // 4
    first = torch.cat([data.batch(step) for step in range(per_epoch)])
    assert len(first.unique(dim=0)) == len(data.training[: per_epoch * 4].unique(dim=0))
    assert torch.equal(data.batch(3), data.batch(3)) and not torch.equal(data.batch(0), data.batch(per_epoch))
    held = {tuple(window.tolist()) for window in data.heldout}
    assert not held & {tuple(window.tolist()) for window in data.training}


def test_scratch_of_another_run_is_gone(student, model, tmp_path):
    distill(student, model, tmp_path, "first")
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    assert distill(student, model, tmp_path, "second")[0]["steps"] == 6
