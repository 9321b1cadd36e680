"""Reads and writes models on disk: plain Hugging Face folders, and ModelOpt's quantized exports."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trimtab import families
from trimtab.base.errors import Failure, InputError
from trimtab.catalog import kv_caches
from trimtab.catalog.formats import STORAGES
from trimtab.model.files import CONFIG, is_computed, read_json, weight_files
from trimtab.model.headers import read_header
from trimtab.runtime.checkpoint import config_file, layer_layout, skeleton, stream
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized

_FINGERPRINT_ROWS = 2
_NEVER_QUANTIZED = re.compile(r"(?:^|\.)(?:\w*embed\w*|\w*norm\w*|wte|wpe)$")


def load(
    folder: Path, dtype: torch.dtype, as_stored: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a plain checkpoint in eval mode, from safetensors only and without running its code.

    Its modules have the checkpoint's names, see `runtime.checkpoint.skeleton`; its parameters can be trained.

    Args:
        dtype: what it computes in.
        as_stored: leaves weights in their files, which processes of one machine read once for all, and in the type that
            they have there: for whoever takes a part of each.

    Raises:
        InputError: no tokenizer, no safetensors, a broken file, or tensors that the model needs are missing.
    """
    model = skeleton.skeleton(folder, dtype)
    try:
        _fill(model, Export(folder), None if as_stored else dtype)
    except (Failure, RuntimeError) as error:
        raise InputError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from None
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InputError(f"{folder}: lacks {name}, which the model needs; download it again")
    return model.requires_grad_(True).eval(), load_tokenizer(folder)


def _fill(model: PreTrainedModel, export: Export, dtype: torch.dtype | None) -> None:
    places = model.state_dict()
    for name in export.names:
        if name not in places:  # a head that is the embedding once more, or what stands beside the text model
            continue
        tensor = export.tensor(name) if dtype else export.view(name)
        if tensor.shape != places[name].shape:
            raise Failure("export_damaged", f"{name} is {list(tensor.shape)}, not {list(places[name].shape)}")
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if skeleton.kept_in_float32(model, name) else dtype or tensor.dtype)
        skeleton.put(model, name, tensor)


def load_for_measuring(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads as `load` does, onto a GPU in bfloat16 where there is one, else in float32.

    What is measured is activations; their sums are float32 in both cases.

    Raises:
        InputError: as `load`, and a weight that is not finite: everything behind it would not be.
    """
    gpu = torch.cuda.is_available()
    model, tokenizer = load(folder, torch.bfloat16 if gpu else torch.float32)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    return (model.to("cuda") if gpu else model), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: has no tokenizer that loads: {_first_line(error)}") from None


def save(model: PreTrainedModel, folder: Path, source: Path) -> None:
    """Writes the weights of a plain checkpoint; all else as it is in `source`, the folder that the model was read from.

    Not as transformers would write it: it refuses a generation config with a temperature and do_sample false, as many
    models have it, and its versions before 5 do not know the tokenizers of 5 by their names.
    """
    family = skeleton.family_of(model)
    head, tied, config = f"{family.head}.weight", model.config.tie_word_embeddings, model.config.to_dict()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == head)}
    original = Export(source)  # what stands beside the text model was never loaded
    tensors |= {name: original.view(name) for name in original.names if family.is_beside(name, config)}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder)
    stream.copy_the_rest(source, folder)
    config_file.write(folder, config_file.with_dtype(read_json(source / CONFIG), model.dtype))


def weight_file_bytes(folder: Path) -> int:
    """Returns the bytes of a checkpoint's safetensors files."""
    return sum((folder / name).stat().st_size for name in weight_files(folder).names)


def end_tokens(folder: Path) -> list[int]:
    """Returns the tokens that end an answer: the generation config's, else the model's, else its text model's."""
    path, config = Path(folder) / "generation_config.json", read_json(Path(folder) / CONFIG)
    own = read_json(path) if path.is_file() else {}
    ends = {**families.text_config(config), **config, **own}.get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])


class Export:
    """A model folder as its files describe it; tensors are read when asked for, one at a time.

    `layers` says how each quantized layer is stored; it is empty for a plain checkpoint. `kv_cache_algo` is
    ModelOpt's name of the KV cache's format, None for 16 bits.

    Raises:
        InputError: no config.json or no safetensors.
        Failure: `unsupported`, a quantization that is not ModelOpt's or not in the catalog;
            `export_damaged`, a file that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files = {name: _open(self.folder / name) for name in weight_files(self.folder).names}
        self._home = {name: file for file in self._files.values() for name in _stored(file)}
        self._quantization = _read_quantization(self.folder)
        self.kv_cache_algo: str | None = self._quantization.get("kv_cache_quant_algo")

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._home)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._home

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor into memory of its own.

        Raises:
            Failure: `export_damaged`, it is missing.
        """
        # A view of the file begins at any byte, and `_weight_int8pack_mm` crashes on such an address.
        return self.view(name).clone()

    def view(self, name: str) -> torch.Tensor:
        """Returns one tensor as its file holds it, for reading only: its memory is that of the file.

        Raises:
            Failure: `export_damaged`, it is missing.
        """
        if name not in self._home:
            raise Failure("export_damaged", f"{name.rpartition('.')[0]}: tensor {name} is missing")
        return self._home[name].get_tensor(name)

    @cached_property
    def layers(self) -> dict[str, Layout]:
        """The quantized layers, by module name."""
        algo = self._quantization.get("quant_algo")
        if algo is None:
            return {}
        if algo == "MIXED_PRECISION":
            listed = self._quantization.get("quantized_layers", {})
            return {name: _layout(entry) for name, entry in sorted(listed.items())}
        layout = _layout(self._quantization)
        excluded = self._quantization.get("exclude_modules") or []
        return {
            name: layout
            for name in sorted(self._candidates())
            if not any(fnmatchcase(name, pattern) for pattern in excluded)
        }

    @property
    def plain_layers(self) -> list[str]:
        """The modules with a matrix that is not quantized, embeddings left out."""
        return sorted(set(self.matrices) - self.layers.keys())

    @property
    def matrices(self) -> list[str]:
        """The modules with a matrix, quantized or not, embeddings left out."""
        return sorted(self._candidates())

    def _candidates(self) -> Iterator[str]:
        """Modules with a matrix, or with a scale whose matrix may be missing."""
        for module in {name.rpartition(".")[0] for name in self._home}:
            if any(f"{module}.{scale}" in self._home for scale in layer_layout.SCALES):
                yield module
            elif f"{module}.weight" in self._home and not _NEVER_QUANTIZED.search(module):
                weight = f"{module}.weight"
                if len(self._home[weight].get_slice(weight).get_shape()) == 2:
                    yield module

    def layer(self, name: str) -> Quantized:
        """Reads and checks the tensors of a quantized layer.

        Raises:
            Failure: `export_damaged`, names the layer and what is missing or wrong.
        """
        scales = {s: self.tensor(f"{name}.{s}") if f"{name}.{s}" in self._home else None for s in layer_layout.SCALES}
        if scales["weight_scale"] is None:
            raise Failure("export_damaged", f"{name}: its weight_scale is missing")
        layer = Quantized(self.layers[name], self.tensor(f"{name}.weight"), **scales)
        layer_layout.check(name, layer)
        return layer

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that tell models apart: SHA-256 over each tensor's name, type, shape and first rows.

        It does not depend on how the tensors are spread over files, and takes a moment for any size: training,
        pruning and casting change every tensor that they touch in its first rows too.
        """
        found = hashlib.sha256()
        for name in self.names:
            part = self._home[name].get_slice(name)
            rows = part[:_FINGERPRINT_ROWS] if part.get_shape() else self._home[name].get_tensor(name)
            found.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode())
            found.update(rows.contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


def _layout(entry: dict[str, Any]) -> Layout:
    algo = entry.get("quant_algo")
    if algo not in STORAGES:
        raise Failure("unsupported", f"quant_algo {algo} cannot be read; known: {', '.join(STORAGES)}")
    if entry.get("has_zero_point"):
        raise Failure("unsupported", f"quant_algo {algo} with zero points cannot be read")
    return Layout(algo, entry.get("group_size") or STORAGES[algo].block if STORAGES[algo].in_groups else 0)


def _read_quantization(folder: Path) -> dict[str, Any]:
    """Returns ModelOpt's settings from hf_quant_config.json, else from config.json; {} if not quantized."""
    own = folder / "hf_quant_config.json"
    if own.is_file():
        return read_json(own).get("quantization", {})
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings:
        return {}
    if settings.get("quant_method") != "modelopt":
        method = settings.get("quant_method")
        raise Failure("unsupported", f"{folder}: quant_method {method!r} cannot be read, only 'modelopt'")
    weights = [group.get("weights", {}) for group in settings.get("config_groups", {}).values()]
    group_size = next((entry["group_size"] for entry in weights if "group_size" in entry), 0)
    return {
        "group_size": group_size,
        "exclude_modules": settings.get("ignore"),
        # TensorRT-LLM reads no other KV cache than FP8 out of this: ModelOpt writes NVFP4 here as a bare string.
        "kv_cache_quant_algo": kv_caches.of_scheme(settings.get("kv_cache_scheme")),
        **settings,
    }


def _stored(file: Any) -> Iterator[str]:
    """The names of a file's tensors, without what transformers computes itself."""
    for name in file.keys():  # noqa: SIM118
        if not is_computed(name, file.get_slice(name).get_shape()):
            yield name


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise Failure("export_damaged", f"{path.name} cannot be read: {_fault(path) or _first_line(error)}") from None


def _fault(path: Path) -> str | None:
    """What is wrong with a safetensors file, which tensor is cut: the library's own message names none."""
    try:
        read_header(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ").rpartition(";")[0]
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
