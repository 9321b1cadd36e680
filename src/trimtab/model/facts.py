"""The facts of a model, read from its folder without torch: config.json and the headers of its safetensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.families import Family
from trimtab.model import low_precision
from trimtab.model.files import has_tokenizer, read_json
from trimtab.model.headers import Tensor, read_tensors
from trimtab.model.layouts import Layout, layout

#: Decoders whose embeddings are tied where config.json says nothing (transformers 5.14).
_TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "falcon", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "lfm2", "lfm2_moe", "mamba",
    "minicpm3", "mpt", "opt", "smollm3", "starcoder2", "vaultgemma", "youtu",
}  # fmt: skip
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Linear(NamedTuple):
    """A linear layer: the name of its module, and its features."""

    name: str
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


class ModelFacts(Document):
    """What planning needs to know of a decoder-only language model.

    `layers` counts transformer blocks; `bytes` are those of all tensors in the house's layout, most of them in `dtype`,
    of which tied embeddings are counted once; `linears` are the layers that quantization may apply to (neither
    embeddings nor lm_head).
    """

    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    parameters: int
    bytes: int
    dtype: str
    linears: tuple[Linear, ...]

    @cached_property
    def linear_parameters(self) -> int:
        return sum(layer.parameters for layer in self.linears)


def inspect(folder: str | Path) -> ModelFacts:
    """Reads the facts of the Hugging Face model in a folder, and checks that its files are whole.

    They are those of the model in the house's layout, whatever its files store (`trimtab.model.layouts`).

    Raises:
        InputError: it is not a model that trimtab can use; one sentence says what is wrong and what to do.
    """
    return examine(folder)[0]


def examine(folder: str | Path) -> tuple[ModelFacts, Layout]:
    """Returns what `inspect` does, and how the model's tensors are made of those that the files store.

    Raises:
        InputError: as `inspect`.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf":
        raise InputError(f"{folder}: is a GGUF file, which `fetch` converts; give a folder with config.json")
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give the one that holds config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; {ggufs[0].name} is GGUF, which `fetch` converts" if ggufs else ""
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face model{hint}")
    config = _config(folder)
    stored = layout(folder, config, read_tensors(folder))
    if not has_tokenizer(folder):
        other = "no other tokenizer (tokenizer.model, or vocab.json with merges.txt)"
        raise InputError(f"{folder}: has no tokenizer.json and {other}; add the model's tokenizer")
    return facts_of(folder, config, stored.tensors), stored


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether config.json makes the output head the embedding, as transformers reads it: where it does not say, by
    the model type."""
    said = config.get("tie_word_embeddings")
    return config.get("model_type") in _TIED_BY_DEFAULT if said is None else bool(said)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path)
    tokenizer = folder / "tokenizer_config.json"
    for source, content in ((path, config), (tokenizer, read_json(tokenizer) if tokenizer.is_file() else {})):
        if content.get("auto_map"):
            raise InputError(
                f"{source}: needs remote code (auto_map), which trimtab never runs; use a model whose "
                f"architecture transformers has itself, or remove auto_map if it has this one"
            )
    families.of(config, str(path))  # before all that follows: a model that is not known needs no other remedy
    low_precision.declared_in(folder, config)  # before the weights: a form that is not read needs no whole files
    return config


def facts_of(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelFacts:
    """Returns the facts of the model that has this config.json and these tensors.

    Raises:
        InputError: config.json or the tensors are not those of a model that a family describes.
    """
    path = folder / "config.json"
    family = families.of(config, str(path))
    config = {**config, **family.sizes(config)}
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith("ForCausalLM"):
        raise InputError(f"{path}: architecture '{architecture}' is no decoder-only model (…ForCausalLM)")

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: {key} must be a whole number above 0, got {value!r}")
        return value

    layers, heads, hidden = (number(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    found = {block for name in tensors if (block := family.place(name)[0]) is not None}
    if found != set(range(layers)):
        where = f"{len(found)} blocks named {family.blocks}.…"
        raise InputError(f"{path}: num_hidden_layers is {layers}, and the weights hold {where}; download it again")
    has_head = f"{family.head}.weight" in tensors
    if not has_head and config.get("tie_word_embeddings") is False:
        raise InputError(f"{folder}: {family.head}.weight is missing, and config.json says that it is not tied")
    tied = not has_head or ties_embeddings(config)
    # A tied head that was saved all the same is the same tensor once more.
    counted = [tensor for tensor in tensors.values() if not (tied and tensor.name == f"{family.head}.weight")]
    if not any(tensor.dtype in _DTYPE_NAMES for tensor in counted):
        raise InputError(f"{folder}: holds no floating point weights")
    by_dtype = Counter()
    for tensor in counted:
        by_dtype[tensor.dtype] += tensor.end - tensor.begin
    dtype = by_dtype.most_common(1)[0][0]
    return ModelFacts(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings", 2048),
        tied_embeddings=tied,
        parameters=sum(math.prod(tensor.shape) for tensor in counted),
        bytes=sum(by_dtype.values()),
        dtype=_DTYPE_NAMES.get(dtype, dtype.lower()),
        linears=_linears(path, family, tensors),
    )


def _linears(path: Path, family: Family, tensors: dict[str, Tensor]) -> tuple[Linear, ...]:
    found = []
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or family.place(name)[0] is None:
            continue
        if family.layer(module) is None:  # another build under a name that is known
            raise InputError(
                f"{path}: a '{family.model_type}' has no {name}, which the weights hold: it is built in a way that "
                f"is not described; give another model"
            )
        found.append(Linear(module, *tensor.shape))
    return tuple(found)
