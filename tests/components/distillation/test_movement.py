"""Zeros and training: masks by hand on four by eight, scores that are learned, and zeros that stay."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from trimtab.components.distillation import work
from trimtab.components.distillation.training import resume, training
from trimtab.components.distillation.weights import masks, movement
from trimtab.components.distillation.weights.movement import Movement, ScoredMask, schedule
from trimtab.components.pruning.work import prune
from trimtab.recipe import MovementPruning
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.measure import observe

#: 1 to 32, four by eight.
SCORES = torch.arange(1.0, 33).reshape(4, 8)
SETTINGS = {"tokens": 10 * 4 * 32, "batch_size": 4, "length": 32, "learning_rate": 0.001}


@pytest.mark.parametrize(("sparsity", "dropped"), [(0.0, 0), (0.25, 8), (0.85, 27), (0.01, 0)])
def test_the_lowest_scores_are_dropped(sparsity, dropped):
    assert masks.top(SCORES, sparsity).flatten().tolist() == [n >= dropped for n in range(32)]


def test_the_share_is_exact_among_equals():
    assert masks.top(torch.ones(4, 8), 0.5).sum() == 16


@pytest.mark.parametrize(
    ("step", "expected"),
    # 100 steps: final from step 70; half the way at step 35, where 1 - 0.5³ are reached.
    [(0, 0.0), (35, 0.875), (70, 1.0), (99, 1.0), (100, 1.0)],
)
def test_schedule(step, expected):
    assert schedule(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7])
def test_short_trainings_end_with_the_final_sparsity(steps):
    assert schedule(steps - 1, steps) == 1.0


def test_the_gradient_passes_straight_to_the_scores():
    """By hand: of sum(C ∘ W ∘ M) the gradient is C ∘ M for the weights and C ∘ W for the scores, dropped or not."""
    layer, coefficients = nn.Linear(8, 4, bias=False), SCORES - 16
    mask = SCORES > 16
    parametrize.register_parametrization(layer, "weight", ScoredMask(mask))
    weight = layer.parametrizations.weight
    assert torch.equal(layer.weight, weight.original * mask)
    (coefficients * layer.weight).sum().backward()
    assert torch.equal(weight.original.grad, coefficients * mask)
    assert torch.equal(weight[0].scores.grad, coefficients * weight.original)


class Network(nn.Module):
    """Two linear layers of four by eight where `observe.linears` finds them."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 2, "model_type": "llama"})
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict()}) for _ in range(2))
        for block in self.model.layers:
            block["mlp"]["up_proj"] = nn.Linear(8, 4, bias=False)
        for layer, weight in zip(self.layers, (first, second), strict=True):
            layer.weight.data = weight.clone()

    @property
    def layers(self) -> list[nn.Linear]:
        return [block["mlp"]["up_proj"] for block in self.model.layers]


def attached(first=SCORES, second=SCORES + 16, **settings) -> tuple[Network, Movement]:
    network, change = Network(first, second), Movement(MovementPruning(method="movement", **settings))
    change.attach(network)
    return network, change


@pytest.mark.parametrize(
    ("settings", "first_is_kept"),
    # The smallest weight gets the highest score, 1; its size over the layer's, and the others', is 0 to 1.7.
    [({"magnitude_weight": 0.0}, True), ({"magnitude_weight": 100.0}, False), ({"scores": "magnitude"}, False)],
)
def test_what_is_kept(settings, first_is_kept):
    network, change = attached(sparsity=0.5, **settings)
    shown = [layer.weight.detach() for layer in network.layers]
    assert all(torch.equal(weight != 0, SCORES > 16) for weight in shown), "before: magnitude pruning untrained"
    change.before_step(0, 100)
    assert all((layer.weight != 0).all() for layer in network.layers), "the schedule begins with all weights"
    for mask in change._masks:
        if isinstance(mask, ScoredMask):
            mask.scores.data[0, 0] = 1.0
    change.before_step(70, 100)
    assert bool(network.layers[0].weight[0, 0] != 0) == first_is_kept
    assert change.measures() == {"zeros": 0.5}
    change.finish(network)
    assert [int((layer.weight != 0).sum()) for layer in network.layers] == [16, 16]
    assert [name for name, _ in network.named_parameters()] == [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)]


def test_a_weight_counts_as_much_as_it_adds_to_the_output():
    """Ones in every place, and inputs that grow: the larger half of the inputs stays, whatever the weights say."""
    network, change = attached(first=torch.ones(4, 8), second=torch.ones(4, 8), sparsity=0.5)
    inputs = torch.arange(1.0, 9).expand(2, 3, 8)
    for step in range(71):
        change.before_step(step, 100)
        for layer in network.layers:
            layer(inputs)
    seen = [step for step in range(70) if (step + 1) % 8 == 0 or step == 69]
    torch.testing.assert_close(change._masks[0].inputs, len(seen) * 6 * inputs[0, 0].square())
    assert all(torch.equal(layer.weight[0] != 0, inputs[0, 0] > 4) for layer in network.layers)
    change.before_step(7, 100)
    with torch.no_grad():
        network.layers[0](inputs)
    assert change._masks[0].inputs[0].item() == pytest.approx(len(seen) * 6), "held-out text is not counted"
    change.finish(network)
    assert not any(layer._forward_pre_hooks for layer in network.layers)


def test_only_scores_have_a_learning_rate_of_their_own():
    _, change = attached(sparsity=0.5, score_learning_rate=0.5)
    (group,) = change.parameter_groups()
    assert group["lr"] == 0.5 and group["params"] == [mask.scores for mask in change._masks]
    assert attached(sparsity=0.5, scores="magnitude")[1].parameter_groups() == []


def test_the_soft_variant_drops_below_the_threshold_and_pays_for_scores():
    """sigmoid(0) is 0.5 and sigmoid(-3) is 0.047, on either side of the final threshold, 0.1."""
    network, change = attached(penalty=4.0)
    assert all((layer.weight != 0).all() for layer in network.layers)
    first, second = change._masks
    first.scores.data[:2] = -3.0
    second.scores.data[:] = -4.0
    change.before_step(70, 100)
    assert (network.layers[0].weight != 0).sum() == 16 and (network.layers[0].weight[:2] == 0).all()
    assert (network.layers[1].weight != 0).sum() == 0, "0.5 % of 32 are none"
    low, middle = torch.sigmoid(torch.tensor([-3.0, 0.0])).tolist()
    mean = ((low + middle) / 2 + torch.sigmoid(torch.tensor(-4.0)).item()) / 2
    penalty = change.penalty()
    assert penalty.item() == pytest.approx(4.0 * mean)
    penalty.backward()
    assert (first.scores.grad > 0).all(), "so that training lowers the scores"


def test_no_layer_is_lost():
    network, change = attached(first=torch.ones(40, 50), second=torch.ones(40, 50), penalty=1.0)
    for mask in change._masks:
        mask.scores.data[:] = -9.0
    change.before_step(70, 100)
    assert [int((layer.weight != 0).sum()) for layer in network.layers] == [10, 10], "0.5 % of 2,000"


def test_early_stopping_waits_for_the_final_sparsity():
    _, change = attached(sparsity=0.5)
    assert [change.is_settled(step, 100) for step in (10, 70, 71, 100)] == [False, False, True, True]


def distill(student, model, folder, weights, name="run", **settings):
    output = folder / f"{name}-output"
    output.mkdir()
    parameters = {**SETTINGS, **settings, "weights": weights}
    metrics = work.distill(str(student), str(model), str(output), str(folder / "scratch"), parameters)
    return metrics, load_file(output / "model.safetensors"), output


def zeros(folder) -> float:
    weights = [layer.weight for layer in observe.linears(model_files.load(folder, torch.bfloat16)[0]).values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("settings", [{}, {"magnitude_weight": 0.0}, {"scores": "magnitude"}])
def test_a_student_of_the_asked_sparsity_learns(settings, model, tmp_path):
    weights = {"movement": {"method": "movement", "sparsity": 0.85, **settings}}
    metrics, _, folder = distill(model, model, tmp_path, weights, tokens=30 * 4 * 32)
    assert metrics["zeros"] == pytest.approx(0.85, abs=1e-4) and zeros(folder) == pytest.approx(0.85, abs=0.001)
    assert metrics["heldout_loss_after"] < metrics["heldout_loss_before"], "better than magnitude pruning untrained"


def test_the_soft_variant_finds_a_sparsity(model, tmp_path):
    weights = {"movement": {"method": "movement", "penalty": 100.0, "score_learning_rate": 1.0}}
    metrics, _, folder = distill(model, model, tmp_path, weights)
    assert 0.05 < metrics["zeros"] < 1 and zeros(folder) == pytest.approx(metrics["zeros"], abs=0.001)


def test_the_dense_student_is_no_answer(model, tmp_path):
    """A learning rate that ruins the student: it is returned all the same, since the other one is not sparse."""
    weights = {"movement": {"method": "movement", "sparsity": 0.5}}
    metrics, _, folder = distill(model, model, tmp_path, weights, learning_rate=10.0)
    assert metrics["improved"] == 0 and zeros(folder) == pytest.approx(0.5, abs=0.001)


@pytest.fixture(scope="module")
def sparse(model, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    prune(str(model), str(calibration), str(folder), str(folder / "scratch"), {"method": "magnitude", "sparsity": 0.5})
    return folder


def test_zeros_stay(sparse, model, tmp_path):
    before = load_file(sparse / "model.safetensors")
    metrics, after, _ = distill(sparse, model, tmp_path, {"keep_zeros": True})
    _, dense, _ = distill(sparse, model, tmp_path, {}, "dense")
    assert metrics["improved"] == 1
    for name in (name for name in before if "_proj" in name):
        gone = before[name] == 0
        assert (after[name][gone] == 0).all() and not torch.equal(after[name], before[name]), name
        assert (dense[name][gone] != 0).any(), "they would grow back"


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


def test_resume_is_exact(model, tmp_path, monkeypatch):
    """Killed between two rankings of the scores, and before the sparsity is final."""
    monkeypatch.setattr(resume, "TRAINING_OVER_SAVING", 0)
    monkeypatch.setattr(movement, "STEPS_BETWEEN_MASKS", 3)
    weights = {"movement": {"method": "movement", "sparsity": 0.5}}
    _, expected, _ = distill(model, model, tmp_path, weights, "whole")
    report = training.progress.report

    def kill(stage, text, done=0, total=0):
        report(stage, text, done, total)
        if done == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.progress, "report", kill)
        with pytest.raises(Killed):
            distill(model, model, tmp_path, weights, "killed")
    assert (tmp_path / "scratch").exists()
    metrics, found, _ = distill(model, model, tmp_path, weights, "resumed")
    assert metrics["steps"] == 10 and all(torch.equal(found[name], expected[name]) for name in expected)
