"""The distillation losses: pure functions of logits and hidden states.

Axes: n tokens, V vocabulary, k stored tokens of the vocabulary, h hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Direction = Literal["forward_kl", "reverse_kl"]


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    label_weight: float,
    direction: Direction = "forward_kl",
) -> torch.Tensor:
    """Returns (1 - w) · T² · divergence + w · cross-entropy, summed over tokens, in nats; a float32 scalar.

    Args:
        student_logits, teacher_logits: [n, V].
        labels: int64 [n], the next token of each position.
        temperature: T, divides both logits; T² keeps the gradient's size independent of it.
        label_weight: w, 0 to 1.
        direction: KL(teacher ‖ student), which covers all that the teacher may say, or KL(student ‖ teacher), which
            keeps to what the teacher says most.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; the reverse direction, Gu et al. 2024,
    "MiniLLM: Knowledge Distillation of Large Language Models".
    """
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return _mixed(student, teacher, student_logits, labels, temperature, label_weight, direction)


def stored_distillation_loss(
    student_logits: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rest: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    label_weight: float,
    direction: Direction = "forward_kl",
) -> torch.Tensor:
    """As `distillation_loss`, where of the teacher the likeliest tokens are known, and the mass of all the others.

    The divergence is that of distributions over k + 1 buckets, the last of which holds the rest: a lower bound of the
    full one, and the full one where k is the vocabulary.

    Args:
        student_logits: [n, V].
        values: [n, k], log-probabilities at the same temperature; they may be rounded.
        indices: integers [n, k], which tokens they are of.
        rest: float32 [n], the logarithm of the mass of the others; the values are scaled to leave just that.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = spread(student.detach(), values, indices, rest)
    return _mixed(student, teacher, student_logits, labels, temperature, label_weight, direction)


def spread(student: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities [n, V] of a teacher of which k are known, and the rest as the student has it.

    Within the rest they are the student's own, scaled to the teacher's mass of it. So each divergence of the student
    from them is that of the k + 1 buckets, and so is its gradient while they are held fixed.

    Args:
        student: log-probabilities, float32 [n, V].
        values, indices, rest: as `stored_distillation_loss` has them.
    """
    indices = indices.long()
    known = values.float()
    known = known + (torch.log1p(-rest.exp()) - known.logsumexp(-1))[:, None]
    own_rest = student.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return (student + (rest - own_rest)[:, None]).scatter(-1, indices, known)


def top(logits: torch.Tensor, count: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (values, indices, rest) of a teacher's logits [n, V], as `stored_distillation_loss` takes them."""
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    values, indices = log_probs.topk(count, dim=-1)
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return values, indices, rest.clamp(LEAST_REST, MOST_REST)


#: Bounds of the rest's log-probability: it is e^-30 where nothing is left, and never quite everything.
LEAST_REST, MOST_REST = -30.0, -1e-6


def hidden_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the squared error of hidden states over the teacher's square, a mean over tokens and pairs of states.

    Each token is weighed by its own size: a few tokens of a language model are a thousand times larger than others.

    Args:
        student, teacher: states [..., h], pair by pair.
    """
    errors = [
        ((s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp_min(1e-6)).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def _mixed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    label_weight: float,
    direction: Direction,
) -> torch.Tensor:
    first, second = (teacher, student) if direction == "forward_kl" else (student, teacher)
    divergence = F.kl_div(second, first, reduction="sum", log_target=True) * temperature**2
    if label_weight == 0:
        return divergence
    return (1 - label_weight) * divergence + label_weight * F.cross_entropy(logits.float(), labels, reduction="sum")
