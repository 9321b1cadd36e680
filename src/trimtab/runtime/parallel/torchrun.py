"""The processes that torchrun starts for one piece of work; without torchrun there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed


def count() -> int:
    """Returns the number of processes that work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0; 0 alone writes files and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started; NCCL on GPUs, one each, else gloo."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpu else "gloo")
    yield
    distributed.destroy_process_group()  # not after an error: the others may be elsewhere, and it waits for them
