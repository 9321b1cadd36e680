"""The losses by hand, against each other, and in chunks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.components.distillation.objective import chunks
from trimtab.components.distillation.objective.loss import (
    distillation_loss,
    hidden_loss,
    stored_distillation_loss,
    top,
)

#: Two tokens, a vocabulary of two; logits that are logarithms of probabilities.
STUDENT = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
TEACHER = torch.tensor([[0.8, 0.2], [0.25, 0.75]]).log()
LABELS = torch.tensor([0, 1])
KL = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)  # of the first token; the second has none
REVERSE = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
CROSS_ENTROPY = -(math.log(0.5) + math.log(0.75))
#: At temperature 2, probabilities p become sqrt(p) / sum sqrt(p): 0.8, 0.2 become 2/3, 1/3.
KL_AT_2 = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.5)


@pytest.mark.parametrize(
    ("temperature", "label_weight", "direction", "expected"),
    [
        (1.0, 0.0, "forward_kl", KL),
        (1.0, 0.0, "reverse_kl", REVERSE),
        (1.0, 1.0, "forward_kl", CROSS_ENTROPY),
        (1.0, 0.25, "forward_kl", 0.75 * KL + 0.25 * CROSS_ENTROPY),
        (1.0, 0.25, "reverse_kl", 0.75 * REVERSE + 0.25 * CROSS_ENTROPY),
        (2.0, 0.0, "forward_kl", 4 * KL_AT_2),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_loss(temperature, label_weight, direction, expected, stored):
    """What is stored of a whole vocabulary gives the same."""
    options = (LABELS, temperature, label_weight, direction)
    if stored:
        loss = stored_distillation_loss(STUDENT, *top(TEACHER, 2, temperature), *options)
    else:
        loss = distillation_loss(STUDENT, TEACHER, *options)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_loss_where_student_and_teacher_agree():
    assert distillation_loss(TEACHER, TEACHER, LABELS, 3.0, 0.0).item() == pytest.approx(0, abs=1e-7)


@pytest.fixture
def logits():
    """A student's and a teacher's, four tokens by eight, and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(4, 8, generator=generator) for _ in range(2))
    return student, teacher, torch.tensor([1, 0, 7, 3])


def buckets(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The probabilities of the indices, and of all others together."""
    known = log_probs.exp().gather(-1, indices)
    return torch.cat([known, 1 - known.sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_stored_logits_are_buckets_and_their_gradient(logits, direction, temperature):
    student, teacher, labels = logits
    student.requires_grad_()
    values, indices, rest = top(teacher, 3, temperature)
    loss = stored_distillation_loss(student, values, indices, rest, labels, temperature, 0.0, direction)
    (gradient,) = torch.autograd.grad(loss, student)
    own = buckets((student / temperature).log_softmax(-1), indices)
    theirs = buckets((teacher / temperature).log_softmax(-1), indices)
    first, second = (theirs, own) if direction == "forward_kl" else (own, theirs)
    expected = temperature**2 * (first * (first / second).log()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, student), rtol=1e-4, atol=1e-5)


def test_what_is_stored_bounds_the_loss_from_below(logits):
    student, teacher, labels = logits
    losses = [stored_distillation_loss(student, *top(teacher, k, 1.0), labels, 1.0, 0.0).item() for k in range(1, 9)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(distillation_loss(student, teacher, labels, 1.0, 0.0).item(), rel=1e-5)


def test_the_mass_of_the_rest_survives_rounding(logits):
    """Values in float16 are a thousandth wrong; what a student with the teacher's logits still loses is tiny."""
    _, teacher, labels = logits
    values, indices, rest = top(teacher, 3, 1.0)
    loss = stored_distillation_loss(teacher, values.half(), indices, rest, labels, 1.0, 0.0)
    assert 0 <= loss.item() < 1e-5


def test_a_teacher_that_is_certain():
    certain = torch.tensor([[100.0, 0, 0, 0]])
    student = torch.zeros(1, 4, requires_grad=True)
    loss = stored_distillation_loss(student, *top(certain, 2, 1.0), torch.tensor([0]), 1.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), rel=1e-4) and torch.isfinite(student.grad).all()


def test_hidden_states_are_measured_by_the_size_of_each():
    teacher = [torch.tensor([[3.0, 4.0], [300.0, 400.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    student = [torch.tensor([[3.0, 3.0], [300.0, 300.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    assert hidden_loss(student, teacher).item() == pytest.approx((1 / 25 + 1 / 2) / 2)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_loss_and_gradients_of_the_whole(rows, bias, monkeypatch):
    torch.manual_seed(0)
    head, hidden, target = nn.Linear(8, 10, bias=bias), torch.randn(4, 8, requires_grad=True), torch.randn(4, 10)
    labels = torch.tensor([1, 0, 7, 3])
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", rows * 4 * 10)
    loss = partial(distillation_loss, temperature=2.0, label_weight=0.5)
    inputs = [hidden, *head.parameters()]
    found = chunks.loss_in_chunks(hidden, head, loss, target, labels)
    expected = loss(F.linear(hidden, head.weight, head.bias), target, labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(chunks.loss_in_chunks(hidden, head, loss, target, labels), expected)
