"""Says which part did not fit when a GPU's memory runs out, and by how much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trimtab.base.errors import Failure
from trimtab.model.hardware import GB

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@contextmanager
def part(name: str, device: torch.device) -> Iterator[None]:
    """Names what the body puts into a GPU's memory: "weights", "KV cache" or "activations".

    Raises:
        Failure: `does_not_fit`, the body ran out of it; other exceptions pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise does_not_fit(name, asked_for(error), free, total) from error


def asked_for(error: torch.OutOfMemoryError) -> int:
    """Returns the bytes that PyTorch's allocator says it was asked for, or 0."""
    found = re.search(r"Tried to allocate ([\d.]+) (\w+)", str(error))
    return round(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0


def does_not_fit(name: str, needed: int, free: int, total: int) -> Failure:
    """The failure of a part that needs more bytes than are free."""
    short = f", {(needed - free) / GB:.2f} GB too few" if needed > free else ""
    what = f"{needed / GB:.2f} GB more were needed" if needed else "more was needed"
    return Failure(
        "does_not_fit", f"{name} did not fit: {what}, and {free / GB:.2f} of {total / GB:.2f} GB were free{short}"
    )


def free(device: torch.device) -> int:
    """Returns the bytes that PyTorch can still take on a GPU, with what it keeps for itself and does not use."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def used() -> int:
    """Returns the bytes in use on the first GPU, by any process: other back ends work in processes of their own."""
    if not torch.cuda.is_available():
        return 0
    available, total = torch.cuda.mem_get_info()
    return total - available
