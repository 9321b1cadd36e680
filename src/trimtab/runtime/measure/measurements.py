"""What was measured on a model, as a folder of safetensors that says which model it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.base.errors import InputError
from trimtab.runtime.checkpoint.model_files import Export

_ABOUT = "about.json"


def bind(folder: Path, checkpoint: Path) -> None:
    """Says in a folder that what it holds was measured on this checkpoint, by its fingerprint."""
    about = {"model": Export(checkpoint).fingerprint}
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def check(folder: Path, checkpoint: Path, field: str) -> None:
    """Refuses what was measured on another checkpoint.

    Args:
        field: how the error names the folder.

    Raises:
        InputError: another model, or none that is known.
    """
    path = folder / _ABOUT
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found, expected = about.get("model", "none is named"), Export(checkpoint).fingerprint
    if found != expected:
        raise InputError(
            f"{field}: describes another model (fingerprint {found[:12]}) than the one to work on "
            f"({expected[:12]}); measure this one"
        )


def write(folder: Path, checkpoint: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors as `<name>.safetensors`, and binds the folder to the checkpoint by its fingerprint."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    bind(folder, checkpoint)


class Measurements:
    """Tensors that were measured on a checkpoint, read one at a time.

    Args:
        folder: what `write` made, one file or several.
        checkpoint: the model that is about to be changed by them.
        field: how an error names the folder.

    Raises:
        InputError: they describe another model.
    """

    def __init__(self, folder: Path, checkpoint: Path, field: str):
        self._field = field
        check(folder, checkpoint, field)
        self._home: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self._home |= dict.fromkeys(opened.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __getitem__(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            InputError: it was not measured.
        """
        if name not in self._home:
            raise InputError(f"{self._field}: lacks {name}; measure this model with this version of trimtab")
        with safe_open(self._home[name], "pt") as file:  # an open one keeps in memory what has been read of it
            return file.get_tensor(name).clone()
