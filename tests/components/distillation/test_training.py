"""The loop: it learns, resumes bit for bit, stops early, refuses to diverge, and is judged at the end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from facts import llama
from safetensors.torch import load_file, save_file
from tiny import write_model
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.base.errors import Failure, InputError
from trimtab.components.distillation import work
from trimtab.components.distillation.objective import objective
from trimtab.components.distillation.text import data
from trimtab.components.distillation.training import optimization, resume, training
from trimtab.components.distillation.training.optimization import Optimizer, schedule
from trimtab.components.distillation.weights.reparametrization import Reparametrization
from trimtab.model import memory
from trimtab.recipe import Distillation


def test_the_student_learns(distill, student, tmp_path):
    metrics, weights, told = distill(tokens=20 * 4 * 32, schedule="constant")
    assert metrics["steps"] == len(told["train"]) == len(told["learning_rate"]) == 20
    assert metrics["improved"] == 1 and metrics["heldout_loss_after"] < 0.9 * metrics["heldout_loss_before"]
    assert metrics["tokens"] == 20 * 4 * 32 and metrics["stopped_early"] == 0
    assert sum(told["train"][-5:]) < sum(told["train"][:5])
    assert told["heldout"][0] == [0, metrics["heldout_loss_before"]] and told["heldout"][-1][0] == 20
    before = load_file(student / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "reverse_kl", "temperature": 2.0, "label_weight": 0.2},
        {"hidden_weight": 1.0, "schedule": "linear"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_loss_is_learned(distill, settings):
    metrics, _, _ = distill(tokens=20 * 4 * 32, **settings)
    assert metrics["heldout_loss_after"] < 0.95 * metrics["heldout_loss_before"]


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


@pytest.mark.parametrize("steps_done", [2, 5])
def test_resume_is_exact(steps_done, distill, tmp_path, monkeypatch):
    """Killed in the middle and started again gives the weights of an uninterrupted run, bit for bit."""
    monkeypatch.setattr(resume, "TRAINING_OVER_SAVING", 0)
    _, expected, told = distill("whole")
    report = training.progress.report

    def kill(stage, text, done=0, total=0):
        report(stage, text, done, total)
        if done == steps_done:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.progress, "report", kill)
        with pytest.raises(Killed):
            distill("killed")
    # A kill while a checkpoint is written leaves a partial folder, which is not read.
    half = tmp_path / "scratch" / f"training-{steps_done + 1:08d}.partial"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    resumed = []
    with monkeypatch.context() as patch:
        patch.setattr(resume.progress, "report", lambda stage, text, *counts: resumed.append(text))
        metrics, weights, resumed_told = distill("resumed")
    assert resumed[0] == f"resumed after step {steps_done - 1}"
    assert resumed_told == told and metrics["steps"] == 6
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_checkpoints_are_spaced_by_what_they_take(student, tmp_path):
    model, _ = work.checkpoints.load(student, torch.float32)
    saved = resume.Checkpoint(tmp_path, model, Optimizer(model, Distillation(tokens=1)))
    expected = 12 * sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert saved.took == pytest.approx(expected)
    saved.saved_at -= 21 * expected
    assert saved.is_due
    saved.save(resume.Curve([1.0]))
    assert saved.took > 0 and not saved.is_due
    saved.saved_at -= 21 * saved.took
    assert saved.is_due


def test_parts_of_a_batch_make_the_step_of_the_whole(distill):
    _, whole, told = distill("whole")
    _, parts, told_parts = distill("parts", gradient_accumulation=2)
    assert told_parts["train"] == pytest.approx(told["train"], rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0.02, atol=1e-3)  # bfloat16 on disk


@pytest.mark.parametrize("settings", [{}, {"hidden_weight": 1.0}, {"gradient_accumulation": 2}], ids=str)
def test_checkpointing_leaves_every_gradient_as_it_was(distill, settings):
    _, plain, told = distill("plain", **settings)
    _, checkpointed, told_too = distill("checkpointed", activation_checkpointing=True, **settings)
    assert told_too["train"] == told["train"]
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_dropout_is_off(student, model, distill, tmp_path):
    """Nothing random is drawn in training, so there is nothing of it to resume; nor in blocks that are recomputed."""
    _, expected, told = distill("plain")
    other = tmp_path / "other"
    work.shutil.copytree(student, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    for settings in ({}, {"activation_checkpointing": True}):
        _, weights, told_too = distill(f"dropout-{len(settings)}", pair=(other, model), **settings)
        assert told_too == told and all(torch.equal(weights[name], expected[name]) for name in expected)


def kept(model, tokens) -> int:
    """Bytes that autograd keeps for the gradients of a pass, the parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(tokens, use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"intermediate_size": 320}, {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}],
    ids=str,
)
def test_what_is_kept_of_a_token_in_a_block_is_what_the_plan_counts(sizes, dtype):
    """The difference that a block makes; the same count has 109, 131 and 201 kB for Llama 3's 1B, 3B and 8B."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    found = []
    for layers in (1, 2):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **shape)
        found.append(kept(LlamaForCausalLM(config).to(dtype).train(), torch.zeros(1, 128, dtype=torch.int64)))
    head = config.head_dim
    facts = llama(1, 64, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, head, 64,
                  2048, False)  # fmt: skip
    assert memory.activation_bytes(facts, dtype.itemsize) == pytest.approx((found[1] - found[0]) / 128, rel=0.03)


def test_checkpointing_keeps_what_goes_into_each_block(model, tmp_path):
    network, _ = work.checkpoints.load(model, torch.float32)
    tokens = torch.arange(64).reshape(2, 32) % network.config.vocab_size
    network.train()
    whole = kept(network, tokens)
    settings = Distillation(tokens=1, activation_checkpointing=True)
    objective_ = objective.Objective(network, network, settings)
    training.Training(objective_, tokens, data.Batches(tokens, settings.model_copy(update={"batch_size": 2})), settings,
                      tmp_path)  # fmt: skip
    blocks = network.config.num_hidden_layers * tokens.numel() * network.config.hidden_size * 4
    assert blocks <= kept(network, tokens) < whole / 2


def break_loss(monkeypatch, broken_call: int):
    loss, calls = objective.distillation_loss, []

    def broken(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) == broken_call else 1)

    monkeypatch.setattr(objective, "distillation_loss", broken)


def test_divergence_names_the_step_and_leaves_the_last_good_checkpoint(distill, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "TRAINING_OVER_SAVING", 0)
    break_loss(monkeypatch, 1 + 3)  # after the held-out windows
    with pytest.raises(Failure, match="the distillation loss is nan at step 3 of 6; a lower learning_rate") as caught:
        distill()
    assert caught.value.failure_class == "training_diverged"
    (kept,) = (tmp_path / "scratch").glob("training-*")
    (file,) = kept.glob("*.safetensors")
    left = load_file(file)
    assert kept.name == "training-00000002" and all(torch.isfinite(tensor).all() for tensor in left.values())
    assert all(tensor == 2 for name, tensor in left.items() if name.startswith("step."))


def test_weights_that_are_not_finite_replace_no_checkpoint(student, tmp_path):
    model, _ = work.checkpoints.load(student, torch.float32)
    saved = resume.Checkpoint(tmp_path, model, Optimizer(model, Distillation(tokens=1)))
    saved.save(resume.Curve([1.0]))
    model.model.norm.weight.data[0] = math.nan
    saved.save(resume.Curve([1.0, 2.0]))
    assert saved.resume().train == [1.0] and torch.isfinite(model.model.norm.weight).all()


def test_a_student_that_became_worse_is_not_kept(distill, student):
    metrics, weights, told = distill(learning_rate=10.0)
    assert metrics["improved"] == 0 and told["improved"] is False
    before = load_file(student / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_early_stopping_keeps_the_best(distill, monkeypatch):
    """A learning rate that is right at first and later far too high: the best student is that of before."""

    def rises(step, *_):
        return 1.0 if step < 6 else 1000.0

    monkeypatch.setattr(training, "schedule", rises)
    monkeypatch.setattr(data, "MOST_HELD_OUT", 4)
    metrics, _, told = distill(tokens=20 * 4 * 32, early_stopping=2)
    assert metrics["stopped_early"] == 1 and metrics["steps"] < 20
    assert told["best"] == min(told["heldout"], key=lambda entry: entry[1])[0] < 10
    assert metrics["heldout_loss_after"] == pytest.approx(dict(map(tuple, told["heldout"]))[told["best"]])
    assert metrics["improved"] == 1


class Offset(Reparametrization):
    """Adds a learned number to every weight of one layer; forgets nothing over a kill, and is gone in the end."""

    def attach(self, student):
        self.seen = []
        self.layer = student.model.layers[0].mlp.up_proj
        torch.nn.utils.parametrize.register_parametrization(self.layer, "weight", self._Add())

    class _Add(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, weight):
            return weight + self.offset

    @property
    def added(self):
        return self.layer.parametrizations.weight[0]

    def parameter_groups(self):
        return [{"params": [self.added.offset], "lr": 0.1}]

    def before_step(self, step, steps):
        self.added.steps += 1
        self.seen.append((step, steps))

    def penalty(self):
        return (self.added.offset - 1).square()

    def finish(self, student):
        torch.nn.utils.parametrize.remove_parametrizations(self.layer, "weight")


def test_weights_may_change_while_they_train(distill, monkeypatch):
    made = []
    monkeypatch.setattr(work, "_change", lambda *_: made.append(Offset()) or made[-1])
    monkeypatch.setattr(resume, "TRAINING_OVER_SAVING", 0)
    metrics, weights, told = distill("whole")
    assert made[0].seen == [(step, 6) for step in range(7)]
    assert told["train"][0] > 1 and told["train"][-1] < told["train"][0]  # the penalty, which falls
    assert not [name for name in weights if "parametrizations" in name]
    finish, counted = Offset.finish, []

    def count(change, student):
        counted.append(change.added.steps.item())
        finish(change, student)

    monkeypatch.setattr(Offset, "finish", count)
    report = training.progress.report

    def kill(stage, text, done=0, total=0):
        if done == 4:
            raise Killed
        report(stage, text, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(training.progress, "report", kill)
        with pytest.raises(Killed):
            distill("killed")
    _, again, told_again = distill("resumed")
    assert told_again == told and counted == [7]  # its buffer was saved too
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule(kind, expected):
    """Twenty steps, of which a tenth rise; the last value is where a step after the last would be."""
    found = [schedule(step, 20, kind, 0.1) for step in (0, 1, 2, 11, 20)]
    assert found == pytest.approx(expected)
    assert kind != "cosine" or schedule(5, 20, kind, 0.1) > schedule(5, 20, "linear", 0.1)
    assert schedule(0, 1, kind, 0.0) == 1.0


def test_a_16_bit_weight_learns_what_its_master_does():
    """Steps that are too small for bfloat16 add up in the master."""
    torch.manual_seed(0)
    settings = Distillation(tokens=1, learning_rate=1e-4)
    exact = torch.nn.Linear(8, 4)
    exact.weight.data = exact.weight.data.bfloat16().float()
    rounded = torch.nn.Linear(8, 4)
    rounded.load_state_dict(exact.state_dict())
    rounded.bfloat16()
    optimizers = Optimizer(exact, settings), Optimizer(rounded, settings)
    for _ in range(50):
        for layer, optimizer in zip((exact, rounded), optimizers, strict=True):
            layer(torch.ones(1, 8, dtype=layer.weight.dtype)).sum().backward()
            optimizer.gather()
            optimizer.step(1.0)
    torch.testing.assert_close(rounded.weight, exact.weight.bfloat16())
    assert rounded.weight.grad is None and optimizers[1].gradients == []


def test_gradients_are_clipped(monkeypatch):
    layer = torch.nn.Linear(4, 1, bias=False)
    optimizer = Optimizer(layer, Distillation(tokens=1))
    layer.weight.grad = torch.full((1, 4), 100.0)
    seen = []
    monkeypatch.setattr(optimizer.adam, "step", lambda: seen.append(layer.weight.grad.norm().item()))
    optimizer.gather()
    optimizer.step(1.0)
    assert seen == [pytest.approx(optimization.MAX_NORM)]


def test_the_work_takes_the_digests_of_its_files(distill):
    assert distill(files={"a.txt": "0" * 64})[0]["steps"] == 6


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("narrow") / "model", layers=2, hidden=32)


def test_hidden_states_of_another_size(distill, narrow, model):
    with pytest.raises(InputError, match="distill.hidden_weight: the student's hidden states have 32 numbers and the"):
        distill(pair=(narrow, model), hidden_weight=1.0)


def test_a_student_bigger_than_its_teacher(distill, student, model):
    with pytest.raises(InputError, match="the student has .* parameters, more than its teacher's .*; name the smaller"):
        distill(pair=(model, student))


def test_a_teacher_with_other_tokens(distill, student, model, tmp_path):
    other = tmp_path / "other"
    work.shutil.copytree(model, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("</s>", "<end>"), encoding="utf-8")
    with pytest.raises(InputError, match="the student has other tokens .* distil from a model with the same tokenizer"):
        distill(pair=(student, other))


def test_a_damaged_student(distill, student, model, tmp_path):
    work.shutil.copytree(student, tmp_path / "damaged")
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="model.norm.weight holds NaN or infinity"):
        distill(pair=(tmp_path / "damaged", model))


def test_blocks_are_matched_by_their_norms(student, model):
    """Fresh norms are all one, so the tiny model's are told apart first."""
    from trimtab.components.distillation.objective.objective import matching_blocks

    teacher, _ = work.checkpoints.load(model, torch.float32)
    for number, block in enumerate(teacher.model.layers):
        block.input_layernorm.weight.data += number
    pupil, _ = work.checkpoints.load(student, torch.float32)
    for block, kept in zip(pupil.model.layers, (1, 3), strict=True):
        block.load_state_dict(teacher.model.layers[kept].state_dict())
    assert matching_blocks(pupil, teacher) == [(0, 1), (1, 3)]
    pupil.model.layers[0].input_layernorm.weight.data += 0.5  # it has trained
    assert matching_blocks(pupil, teacher) == [(0, 1), (1, 3)]  # spaced evenly
