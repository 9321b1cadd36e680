"""Data-parallel training: each process takes its rows of every batch, and all take the same steps.

What a process holds of a model, and where its gradients go, is `sharding`'s; here is what processes say to each other.
Without a process group everything here does nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from functools import cache

import torch
from torch import distributed

from trimtab.base.errors import InputError
from trimtab.runtime.parallel.torchrun import count, rank

#: Bytes that are averaged at once: many small tensors in one message.
BUCKET_BYTES = 64 << 20
#: What torchrun handles while its processes run, and leaves so when they have ended.
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def share(rows: torch.Tensor) -> torch.Tensor:
    """Returns every nth of the rows, those of this process."""
    return rows[rank() :: count()]


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replaces each tensor by its mean over the processes; they have the same order and shapes in all."""
    if count() == 1:
        return
    bucket: list[torch.Tensor] = []
    for place, tensor in enumerate(tensors):
        bucket.append(tensor)
        if place == len(tensors) - 1 or sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            _average(bucket)
            bucket = []


def _average(bucket: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    distributed.all_reduce(flat)
    flat /= count()
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def add(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over the processes, in its place."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def agreed(flag: bool) -> bool:
    """Returns what the first process says, to all of them; no GPU is waited for."""
    if count() == 1:
        return flag
    said = torch.tensor(flag)
    distributed.broadcast(said, 0, group=control())
    return bool(said)


@cache
def control() -> distributed.ProcessGroup | None:
    """Returns the group in which processes talk without their GPUs; None where there is one process."""
    return distributed.new_group(backend="gloo") if count() > 1 else None


def wait() -> None:
    """Waits until every process is here."""
    if count() > 1:
        distributed.barrier(group=control())


def launch(processes: int, arguments: Sequence[str]) -> bool:
    """Runs `python -m trimtab.components.distillation` with the arguments in that many processes, as torchrun does.

    Returns whether all of them came to their end; where one fails, the others are ended. What this process did at the
    signals that torchrun passes on to them, it does again afterwards.

    Raises:
        InputError: fewer GPUs than that.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        have = torch.cuda.device_count()
        raise InputError(f"distill.processes: {processes}, and there are {have} GPUs; write at most {have}")
    options = ["--standalone", f"--nproc-per-node={processes}", "-m", "trimtab.components.distillation"]
    own = {number: signal.getsignal(number) for number in _PASSED_ON}
    try:
        run.main([*options, *arguments])
    except ChildFailedError:
        return False
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
    return True
