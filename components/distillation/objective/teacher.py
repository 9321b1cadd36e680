"""The teacher: a model that runs beside the student, or its logits, computed once and stored.

Stored are the k likeliest tokens of each position and the mass of all the others: 4 k + 4 bytes a token (6 k + 4
where the vocabulary has more than 65,536 tokens). With k = 64 a million tokens take 260 MB (388 MB), so this is for
texts of up to some ten million tokens that are read again: in several epochs, or by several attempts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab.base import progress
from trimtab.base.errors import Failure, InputError
from trimtab.components.distillation.objective.loss import top
from trimtab.components.distillation.text import data
from trimtab.components.distillation.training import data_parallel
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.decoder import head

#: Tokens whose logits are computed at once, and windows in a file.
TOKENS_AT_ONCE = 1024
WINDOWS_IN_A_FILE = 64
#: A vocabulary of more tokens than this is indexed with 32 bits.
MOST_SHORT_INDICES = 1 << 16


@torch.inference_mode()
def teach(
    model: str, output: str, scratch: str, parameters: dict[str, Any], generated: str | None = None
) -> dict[str, float]:
    """Stores the teacher's logits of every window that `data.read` gives, in that order.

    Each `logits-<number>.safetensors` has of a run of windows `tokens`, int32 [windows, length], and of all their
    positions but the last `values`, float16, `indices`, uint16 or int32, both [windows, length - 1, k], and `rest`,
    float32 [windows, length - 1]: what `loss.top` returns. A kill costs one file.

    Args:
        parameters: `text` (a list), `length`, `temperature` and `stored_logits` (k) of the recipe's `distill`.

    Returns:
        windows, tokens, bytes, rest (the mean mass of the tokens that are not stored).

    Raises:
        InputError: more tokens to store than the vocabulary has, or than the disk takes.
    """
    network, tokenizer = checkpoints.load_for_measuring(Path(model))
    head.check(network)
    sources, length, count = parameters["text"], parameters["length"], parameters["stored_logits"]
    windows = data.read(tokenizer, sources, length, Path(generated) if generated else None).all
    vocabulary = network.config.vocab_size
    if count > vocabulary:
        raise InputError(f"distill.stored_logits: {count} of a vocabulary of {vocabulary}; write at most {vocabulary}")
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(folder, windows.numel(), count, vocabulary)
    masses, written = [], 0
    runs = windows.split(WINDOWS_IN_A_FILE)
    for number, run in enumerate(progress.track(runs, "teach", "storing the teacher's logits", len(runs))):
        path = folder / f"logits-{number:05d}.safetensors"
        if not path.exists():
            _save(path, {"tokens": run.int(), **_logits(network, run, count, parameters["temperature"])})
        with safe_open(path, "pt") as file:
            masses.append(file.get_tensor("rest").exp().flatten())
        written += path.stat().st_size
    for path in sorted(folder.glob("logits-*.safetensors")):
        shutil.move(path, output)
    rest = torch.cat(masses).mean().item()
    return {"windows": len(windows), "tokens": windows.numel(), "bytes": written, "rest": rest}


def _logits(network: Any, windows: torch.Tensor, count: int, temperature: float) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {"values": [], "indices": [], "rest": []}
    short = network.config.vocab_size <= MOST_SHORT_INDICES
    output, behind = network.get_output_embeddings(), head.behind(network)
    for some in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        hidden = network.base_model(some.to(network.device), use_cache=False).last_hidden_state[:, :-1]
        for states in hidden.flatten(0, 1).split(TOKENS_AT_ONCE):
            values, indices, rest = top(head.changed(output(states), behind), count, temperature)
            found["values"].append(values.half().cpu())
            found["indices"].append(indices.int().cpu().to(torch.uint16 if short else torch.int32))
            found["rest"].append(rest.cpu())
    shape = (len(windows), windows.shape[1] - 1)
    return {name: torch.cat(parts).unflatten(0, shape) for name, parts in found.items()}


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def _check_disk(folder: Path, tokens: int, count: int, vocabulary: int) -> None:
    need = tokens * (count * (4 if vocabulary <= MOST_SHORT_INDICES else 6) + 8)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"distill.stored_logits: {count} of each of {tokens:,} tokens take {need / 1e9:.1f} GB, and {folder} has "
            f"{free / 1e9:.1f} GB; write a smaller number, or 0 to run the teacher beside the student"
        )


class StoredLogits:
    """The logits that `teach` stored.

    One process has them on the device that trains where they take at most a quarter of its memory, else in the
    machine's. Several leave them in their files, and each reads the windows of its own rows alone.

    Raises:
        Failure: `unsupported`, they are of other windows than the ones given, int64 [windows, length].
    """

    def __init__(self, folder: Path, windows: torch.Tensor, device: torch.device):
        paths = sorted(folder.glob("logits-*.safetensors"))
        size = sum(path.stat().st_size for path in paths)
        if device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory // 4:
            device = torch.device("cpu")
        files = [load_file(path) if data_parallel.count() == 1 else _mapped(path) for path in paths]
        tokens = torch.cat([file.pop("tokens") for file in files])
        if tokens.shape != windows.shape or not torch.equal(tokens.long(), windows):
            raise Failure("unsupported", "distill.stored_logits: they were stored for other text than is trained on")
        parts = {name: [_signed(file.pop(name)) for file in files] for name in ("values", "indices", "rest")}
        if data_parallel.count() == 1:
            parts = {name: [torch.cat([part.to(device) for part in some])] for name, some in parts.items()}
        self._stored = parts
        self._windows_in_a_part = len(parts["rest"][0])

    def rows(self, places: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns values, indices [n, k] and rest [n] of the windows at these places of all, on the device."""
        rows = (self._rows(parts, places) for parts in self._stored.values())
        values, indices, rest = (tensor.flatten(0, 1).to(device, non_blocking=True) for tensor in rows)
        return values, indices.int() & 0xFFFF if indices.dtype == torch.int16 else indices, rest

    def _rows(self, parts: list[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0][places.to(parts[0].device)]
        wanted = (divmod(place, self._windows_in_a_part) for place in places.tolist())
        return torch.stack([parts[part][row] for part, row in wanted])


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, whose memory is that of the file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _signed(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits with a sign where they are uint16, for which torch has few kernels."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor
