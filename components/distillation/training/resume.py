"""Checkpoints of a training, from which it goes on: bit for bit in as many processes, and in any other number.

A checkpoint is a folder that appears as a whole. Each process writes its parts of the tensors into safetensors files of
its own, with PyTorch's distributed checkpoints, which know where in a tensor a part stands: so any number of processes
finds its parts again. Nothing in it is pickled. The folder is shared where there are several nodes.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

from trimtab.base import progress
from trimtab.components.distillation.training import data_parallel, sharding
from trimtab.components.distillation.training.optimization import Optimizer

#: Seconds of training for each second that a checkpoint takes: a kill costs as much, of any size of model.
TRAINING_OVER_SAVING = 20
#: What is expected of the disk before the first was saved.
BYTES_A_SECOND = 1e9
#: Bytes of whole tensors whose parts stand in one file, which is made in memory.
FILE_BYTES = 1 << 30
#: The ending of what is not whole yet, or not any more.
PARTIAL = ".partial"


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
    """Weights, optimizer moments and losses, as the newest folder of their kind; a kill leaves the last whole one.

    The student's parameters and buffers are saved by name, those of a reparametrization among them. `training-<steps>`
    is what a killed run goes on from, `best-<steps>` the student that early stopping goes back to.
    """

    def __init__(self, folder: Path, student: nn.Module, optimizer: Optimizer):
        self.folder, self.student, self.optimizer = folder, student, optimizer
        masters = sum(master.nbytes for _, master in optimizer.pairs)  # beside two moments each
        self.saved_at, self.took = time.monotonic(), 3 * masters / BYTES_A_SECOND

    @property
    def is_due(self) -> bool:
        """Whether enough was trained since the last save; all processes hear what the first one finds."""
        return data_parallel.agreed(time.monotonic() - self.saved_at >= TRAINING_OVER_SAVING * self.took)

    def save(self, curve: Curve) -> None:
        """Saves the state after the last step of the curve; weights that are not finite do not replace good ones."""
        started = time.monotonic()
        if self.optimizer.is_finite:
            self._write("training", curve)
        self.saved_at = time.monotonic()
        self.took = self.saved_at - started

    def resume(self) -> Curve:
        """Loads what a killed run saved, and returns its losses; an empty curve where there is nothing."""
        saved = self._newest("training")
        if saved is None:
            return Curve()
        self._read(saved)
        document = json.loads((saved / "curve.json").read_text(encoding="utf-8"))
        curve = Curve(document["train"], [(step, loss) for step, loss in document["heldout"]], document["best"])
        if data_parallel.rank() == 0:
            progress.report("distill", f"resumed after step {len(curve.train)}")
        return curve

    def keep_best(self, curve: Curve) -> None:
        """Keeps the student as it is."""
        self._write("best", curve)

    def restore_best(self) -> None:
        """Goes back to the student that was kept."""
        self._read(self._newest("best"))

    def _newest(self, kind: str) -> Path | None:
        whole = [path for path in self.folder.glob(f"{kind}-*") if path.suffix != PARTIAL]
        return max(whole, default=None, key=lambda path: path.name)

    def _write(self, kind: str, curve: Curve) -> None:
        path = self.folder / f"{kind}-{len(curve.train):08d}"
        partial, first = path.with_suffix(PARTIAL), data_parallel.rank() == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "curve.json").write_text(json.dumps(asdict(curve)), encoding="utf-8")
        data_parallel.wait()
        tensors = self._tensors()
        writer = distributed_checkpoint.HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
        _together(distributed_checkpoint.save, tensors, storage_writer=writer)
        if first:
            if path.exists():  # the same steps once more, after a kill
                path.rename(path.with_suffix(f".before{PARTIAL}"))
            partial.rename(path)
            for other in self.folder.glob(f"{kind}-*"):
                if other != path:
                    _remove(other)
        data_parallel.wait()

    def _read(self, path: Path) -> None:
        reader = distributed_checkpoint.HuggingFaceStorageReader(str(path))
        self.optimizer.expect(reader.read_metadata().state_dict_metadata.keys())
        _together(distributed_checkpoint.load, self._tensors(), storage_reader=reader)
        self.optimizer.settle()
        sharding.release(self.student)

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers = ((f"buffer.{name}", buffer.detach()) for name, buffer in self.student.named_buffers())
        return dict([*self.optimizer.tensors(), *buffers])


def _files(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes into."""
    found, size = {}, 0
    for name, tensor in tensors.items():
        found[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.itemsize
    return found


def _together(function: Callable[..., Any], tensors: dict[str, torch.Tensor], **storage: Any) -> None:
    with warnings.catch_warnings():  # it warns of one process
        warnings.simplefilter("ignore", UserWarning)
        function(tensors, process_group=data_parallel.control(), no_dist=data_parallel.count() == 1, **storage)


def _remove(path: Path) -> None:
    """Removes a folder, which is no checkpoint any more before anything of it is gone."""
    if path.suffix != PARTIAL:
        path = path.rename(path.with_suffix(PARTIAL))
    shutil.rmtree(path, ignore_errors=True)
