"""The distillation loss: a pure function of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    label_weight: float,
) -> torch.Tensor:
    """Returns (1 - w) · T² · KL(teacher ‖ student) + w · cross-entropy, a mean over tokens in nats.

    Args:
        student_logits, teacher_logits: [tokens, vocabulary].
        labels: [tokens], the next token of each position.
        temperature: T, divides both logits; T² keeps the gradient's size independent of it.
        label_weight: w, 0 to 1.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    if label_weight == 0:
        return divergence
    return (1 - label_weight) * divergence + label_weight * F.cross_entropy(student_logits.float(), labels)
