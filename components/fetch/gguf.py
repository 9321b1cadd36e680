"""GGUF to an ordinary checkpoint: transformers reads and dequantises it."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.model.files import CONFIG, read_json
from trimtab.model.licence import CARD
from trimtab.runtime.checkpoint import config_file


def convert(paths: Sequence[str], output: str) -> None:
    """Writes the model of a GGUF file, or of the parts of one, as bfloat16 safetensors with config and tokenizer."""
    with tempfile.TemporaryDirectory(prefix="trimtab-gguf-", dir=output) as folder:
        file = Path(folder) / "model.gguf"  # transformers knows the form by this ending, in lower case
        if len(paths) == 1:
            file.symlink_to(Path(paths[0]).absolute())
        else:
            join([Path(path) for path in paths], file)
        where = {"pretrained_model_name_or_path": folder, "gguf_file": file.name, "local_files_only": True}
        with _parsed_once():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            _write_card(str(file), Path(output) / CARD)
    # The weights are plain numbers now; with these marks left, save_pretrained would ask a quantizer that is gone.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.architectures = [type(model).__name__]
    folder = Path(output)
    model.save_pretrained(folder)
    config_file.write(folder, read_json(folder / CONFIG))
    tokenizer.save_pretrained(folder)
    _name_tokenizer(folder / "tokenizer_config.json")


def _write_card(source: str, path: Path) -> None:
    """Writes down which licence the file names, as a model's card has it; llama.cpp's converters copy it from there."""
    fields = gguf.GGUFReader(source).fields
    keys = {"license": "", "license_name": ".name", "license_link": ".link"}
    names = {key: f"general.license{end}" for key, end in keys.items()}
    said = {key: str(fields[name].contents()) for key, name in names.items() if name in fields}
    if said:
        path.write_text(f"---\n{yaml.safe_dump(said)}---\n", encoding="utf-8")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Lets transformers parse a file once: it does for the config, for the weights and twice for the tokenizer, and
    each time Python reads every token of the vocabulary."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _name_tokenizer(path: Path) -> None:
    """Calls the class by the name that transformers before 5 knows too."""
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def join(parts: Sequence[Path], output: Path) -> None:
    """Writes the parts that llama.cpp's gguf-split made of a model as the one file that they were.

    The first part has the model's metadata, each has tensors; nothing is converted.
    """
    readers = [gguf.GGUFReader(part) for part in parts]
    first = readers[0]
    writer = gguf.GGUFWriter(output, first.fields["general.architecture"].contents(), endianess=first.endianess)
    for field in first.fields.values():
        if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
            of_list = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], of_list)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
