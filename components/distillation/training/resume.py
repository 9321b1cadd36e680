"""Checkpoints of a training, from which it goes on bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from trimtab.base import progress
from trimtab.components.distillation.training import data_parallel
from trimtab.components.distillation.training.optimization import Optimizer

#: Seconds of training for each second that a checkpoint takes: a kill costs as much, of any size of model.
TRAINING_OVER_SAVING = 20
#: What is expected of the disk before the first was saved.
BYTES_A_SECOND = 1e9


@dataclass
class Curve:
    """The losses of a training, in nats a token: what is drawn, and what early stopping goes by.

    `train` has the loss of every step; `heldout` pairs of (steps taken, loss); `best` is the number of steps after
    which the student was kept as the best one, None where it never was.
    """

    train: list[float] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None


class Checkpoint:
    """Weights, optimizer moments and losses as safetensors; replaced as a whole, so a kill leaves the last one.

    The student's parameters and buffers are saved by name, those of a reparametrization among them. The first process
    writes and all read, so the folder is shared where there are several nodes. `best.safetensors` beside it is the
    student that early stopping goes back to.
    """

    def __init__(self, folder: Path, student: nn.Module, optimizer: Optimizer):
        self.path, self.best_path = folder / "training.safetensors", folder / "best.safetensors"
        self.student, self.optimizer = student, optimizer
        masters = sum(master.nbytes for _, master in optimizer.pairs)  # beside two moments each
        self.saved_at, self.took = time.monotonic(), 3 * masters / BYTES_A_SECOND

    @property
    def is_due(self) -> bool:
        """Whether enough was trained since the last save."""
        return data_parallel.rank() == 0 and time.monotonic() - self.saved_at >= TRAINING_OVER_SAVING * self.took

    def save(self, curve: Curve) -> None:
        """Saves the state after the last step of the curve; weights that are not finite do not replace good ones."""
        started = time.monotonic()
        if self.optimizer.is_finite:
            _write(self.path, [*self.optimizer.tensors(), *self._buffers()], {"curve": json.dumps(asdict(curve))})
        self.saved_at = time.monotonic()
        self.took = self.saved_at - started

    def resume(self) -> Curve:
        """Loads what a killed run saved, and returns its losses; an empty curve where there is nothing."""
        if not self.path.exists():
            return Curve()
        with safe_open(self.path, "pt") as file:
            document = json.loads(file.metadata()["curve"])
            self._load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        curve = Curve(document["train"], [(step, loss) for step, loss in document["heldout"]], document["best"])
        if data_parallel.rank() == 0:
            progress.report("distill", f"resumed after step {len(curve.train)}")
        return curve

    def keep_best(self) -> None:
        """Keeps the student as it is."""
        if data_parallel.rank() == 0:
            _write(self.best_path, [*self.optimizer.tensors(), *self._buffers()], {})

    def restore_best(self) -> None:
        """Goes back to the student that was kept."""
        data_parallel.wait()
        with safe_open(self.best_path, "pt") as file:
            self._load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def _buffers(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((f"buffer.{name}", buffer.detach()) for name, buffer in self.student.named_buffers())

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.optimizer.load(tensors)
        for name, buffer in self.student.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])


def _write(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, partial, metadata)
    partial.replace(path)
