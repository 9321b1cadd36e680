"""What flows from block to block: the hidden states of all of the text, a batch each, where there is room for them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from trimtab.model import hardware

#: The share of a GPU's memory, and of the machine's, that hidden states may take; larger ones go further away.
DEVICE_SHARE, HOST_SHARE = 1 / 8, 1 / 4


class Activations:
    """Hidden states of batches of windows, floating point [windows, length, hidden] each.

    They stay on the device as long as they take little of it, else in host memory, from which a GPU copies directly,
    and where that is little too in a file that nobody sees.

    Args:
        shapes: of the batches.
        dtype: of the hidden states.
        device: where blocks run.
        folder: where a file would stand; the system's folder for such files if None.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device, folder: Path | None = None
    ):
        self._device = device
        size = sum(shape.numel() for shape in shapes) * dtype.itemsize
        #: Where they are: `device`, `host` or `disk`.
        self.place = place_of(size, device)
        if self.place == "disk":
            # The file has no name once it is mapped: it goes with the process, also after a kill.
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                flat = torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
            parts = flat.split([shape.numel() for shape in shapes])
            self._held = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        else:
            pinned = self.place == "host" and device.type == "cuda"
            where = device if self.place == "device" else "cpu"
            self._held = [torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned) for shape in shapes]

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Returns a batch on the device. On the device itself it is what is held, and not to be changed."""
        return self._held[number].to(self._device, non_blocking=True)

    def __setitem__(self, number: int, hidden: torch.Tensor) -> None:
        self._held[number].copy_(hidden, non_blocking=True)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the batches by `<name>.<number>`, to be written down."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies into host memory may be under way
        return {f"{name}.{number}": hidden for number, hidden in enumerate(self._held)}

    def fill(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the batches that `tensors` gave, in another process perhaps."""
        for number in range(len(self)):
            self[number] = tensors[f"{name}.{number}"]


def place_of(size: int, device: torch.device) -> str:
    """Returns where so many bytes of hidden states go: `device`, `host` or `disk`."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if size <= total * torch.cuda.get_per_process_memory_fraction(device.index) * DEVICE_SHARE:
            return "device"
    return "host" if size <= host_room() else "disk"


def host_room() -> float:
    """Returns the bytes of hidden states that this machine's memory is used for."""
    return hardware.machine_memory() * HOST_SHARE
