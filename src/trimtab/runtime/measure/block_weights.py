"""The weights of a model whose modules stand on the meta device: read for one block at a time, ahead of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from trimtab.base.errors import Failure, InputError
from trimtab.model.files import is_computed, weight_files
from trimtab.model.headers import read_header
from trimtab.runtime.checkpoint import skeleton
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.skeleton import family_of


class BlockWeights:
    """Puts the weights of one block at a time into a skeleton, as `model_files.load_for_measuring` would, and takes
    them out again.

    While a block is in place, a thread reads the next one into host memory, which a GPU then copies from directly.

    Args:
        model: `skeleton.skeleton` of the checkpoint. Its buffers are moved to the device, for they stay.
        folder: a plain checkpoint.
        device, dtype: of the weights; what routers choose by stays in float32.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, device: torch.device, dtype: torch.dtype):
        self._model, self._folder, self._device, self._dtype = model, folder, device, dtype
        self._places = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._files = {
            tensor.name: path
            for path in (folder / name for name in weight_files(folder).names)
            for tensor in read_header(path)
            if tensor.name in self._places and not is_computed(tensor.name, tensor.shape)
        }
        family = family_of(model)
        self._names: dict[int | None, list[str]] = {}
        for name in sorted(self._files):
            self._names.setdefault(family.place(name)[0], []).append(name)
        self._head = f"{family.head}."
        self._pool, self._next = ThreadPoolExecutor(1), {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    @contextmanager
    def block(self, number: int, then: int | None = None) -> Iterator[nn.Module]:
        """Holds a block's weights in place while the body runs, and reads those of the block `then` meanwhile.

        Raises:
            InputError: a weight is missing, or holds NaN or infinity.
            Failure: `export_damaged`, a weight has another shape than the model.
        """
        reading = self._next.pop(number, None) or self._read_soon(number)
        if then is not None and then not in self._next:
            self._next[then] = self._read_soon(then)  # behind the one above: there is one thread
        module = self._model.get_submodule(f"{family_of(self._model).blocks}.{number}")
        try:
            self._put(reading.result())
            del reading  # which would keep what it read in memory
            self._check_whole(module, f"{family_of(self._model).blocks}.{number}.")
            yield module
        finally:
            _empty(module)

    @contextmanager
    def outside(self, head: bool = False) -> Iterator[None]:
        """Holds in place what stands in no block, with or without the output head, while the body runs."""
        names = [name for name in self._names.get(None, ()) if head or not name.startswith(self._head)]
        try:
            self._put(self._read(names))
            if head:
                self._model.tie_weights()
            yield
        finally:
            _empty(self._model)

    def close(self) -> None:
        """Ends the reading thread, and drops what it has read."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next.clear()

    def _read_soon(self, number: int) -> Future[dict[str, torch.Tensor]]:
        return self._pool.submit(self._read, self._names.get(number, []))

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors in memory of their own, each in the type in which the model computes with it."""
        found = {}
        for path in dict.fromkeys(self._files[name] for name in names):
            with safe_open(path, "pt") as file:  # an open one keeps in memory what has been read of it
                for name in names:
                    if self._files[name] == path:
                        found[name] = self._converted(name, file.get_tensor(name))
        return found

    def _converted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != self._places[name]:
            expected = list(self._places[name])
            raise Failure("export_damaged", f"{name} is {list(tensor.shape)}, not {expected}")
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = torch.float32 if skeleton.kept_in_float32(self._model, name) else self._dtype
        tensor = tensor.to(dtype, copy=True)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor = tensor.to(self._device, non_blocking=True)
            check_finite(name, tensor)
            skeleton.put(self._model, name, tensor)

    def _check_whole(self, module: nn.Module, prefix: str) -> None:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                raise InputError(f"{self._folder}: lacks {prefix}{name}, which the model needs; download it again")


def _empty(module: nn.Module) -> None:
    """Gives a module parameters on the meta device again."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
