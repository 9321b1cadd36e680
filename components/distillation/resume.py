"""Checkpoints of a training, from which it goes on bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab import progress

#: Seconds of training for each second that a checkpoint takes: a kill costs as much, of any size of model.
TRAINING_OVER_SAVING = 20

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Checkpoint:
    """Weights, optimizer moments and losses as safetensors; replaced as a whole, so a kill leaves the last one.

    The student's parameters and buffers are saved by name, those of a reparametrization among them.
    """

    def __init__(self, folder: Path, student: nn.Module, optimizer: torch.optim.AdamW):
        self.path = folder / "training.safetensors"
        self.student, self.optimizer = student, optimizer
        self.saved_at, self.took = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough was trained since the last save."""
        return time.monotonic() - self.saved_at >= TRAINING_OVER_SAVING * self.took

    def save(self, losses: list[float]) -> None:
        """Saves the state after the step of the last loss."""
        started = time.monotonic()
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        tensors |= {f"buffer.{name}": buffer.detach() for name, buffer in self.student.named_buffers()}
        for name, parameter in self.student.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in _MOMENTS if state}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self.path)
        self.saved_at = time.monotonic()
        self.took = self.saved_at - started

    def resume(self) -> list[float]:
        """Loads what a killed run saved, and returns its losses; an empty list where there is nothing."""
        if not self.path.exists():
            return []
        tensors = load_file(self.path)
        for name, buffer in self.student.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in self.student.named_parameters():
            parameter.data.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            if moments:
                self.optimizer.state[parameter] = moments
        losses = tensors["losses"].tolist()
        progress.report("distill", f"resumed after step {len(losses)}")
        return losses
