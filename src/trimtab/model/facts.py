"""The facts of a model, read from its folder without torch: config.json and the headers of its safetensors."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.families import Family, SharedInput
from trimtab.families.fusion import block_of
from trimtab.model import low_precision
from trimtab.model.configured import experts_of, sizes_of, ties_embeddings
from trimtab.model.files import has_tokenizer, read_json
from trimtab.model.headers import Tensor, read_tensors
from trimtab.model.layouts import Layout, layout

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
    embeddings nor lm_head, nor the routers of experts). `beside` of the `parameters` take no part in the next token of
    a text, such as the tower of a wrapper. `intermediate_size` counts the neurons that a token passes in a
    block. Of a token a block keeps `head_numbers` for each KV head, or `latent_numbers` for all heads together where an
    engine can keep keys and values compressed; a recurrent block keeps `state_bytes` of a sequence, however long. With
    experts, a token is given to `experts_per_token` of `experts` in each block that has them, which have `expert_size`
    neurons each.
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
    head_numbers: int
    latent_numbers: int = 0
    state_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    beside: int = 0

    def __hash__(self) -> int:
        """Without the layers, of which there may be thousands: what a plan asks of a model is kept by its facts."""
        return hash((self.model_type, self.parameters, self.bytes, self.layers, self.hidden_size))

    @cached_property
    def linear_parameters(self) -> int:
        return sum(layer.parameters for layer in self.linears)

    @cached_property
    def largest_block(self) -> int:
        """The parameters of the linear layers of the largest block."""
        sizes: Counter[int | None] = Counter()
        for layer in self.linears:
            sizes[block_of(layer.name)] += layer.parameters
        return max(sizes.values(), default=0)

    @cached_property
    def blocks_with_attention(self) -> frozenset[int]:
        """The blocks that keep keys and values."""
        return self._blocks_with(families.named(self.model_type).attention.inputs)

    @property
    def attention_blocks(self) -> int:
        """How many blocks keep keys and values."""
        return len(self.blocks_with_attention)

    @cached_property
    def recurrent_blocks(self) -> int:
        """How many blocks keep a recurrent state."""
        part = families.named(self.model_type).recurrent
        return len(self._blocks_with(part.inputs)) if part else 0

    def _blocks_with(self, inputs: tuple[SharedInput, ...]) -> frozenset[int]:
        names = {layer.name for shared in inputs for layer in shared.layers}
        places = (families.named(self.model_type).place(layer.name) for layer in self.linears)
        return frozenset(block for block, within in places if within in names)

    @cached_property
    def active_parameters(self) -> int:
        """The parameters that a token of text passes: of experts, those that it is given to."""
        parameters = self.parameters - self.beside
        if not self.experts:
            return parameters
        family = families.named(self.model_type)
        experts = [layer for layer in self.linears if family.is_expert(layer.name)]
        all_experts = sum(layer.parameters for layer in experts)
        if family.experts.biased:
            all_experts += sum(layer.out_features for layer in experts)
        return parameters - all_experts + all_experts * self.experts_per_token // self.experts


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
    config = families.as_fetched(config)
    if not has_tokenizer(folder):
        other = "no other tokenizer (tokenizer.model, or vocab.json with merges.txt)"
        raise InputError(f"{folder}: has no tokenizer.json and {other}; add the model's tokenizer")
    return facts_of(folder, config, stored.tensors), stored


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
    # Before all that follows: a model that is not known needs no other remedy.
    families.of(families.as_fetched(config), str(path))
    low_precision.declared_in(folder, config)  # before the weights: a form that is not read needs no whole files
    return config


def facts_of(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelFacts:
    """Returns the facts of the model that has this config.json and these tensors.

    Raises:
        InputError: config.json or the tensors are not those of a model that a family describes.
    """
    path = folder / "config.json"
    family = families.of(config, str(path))
    architecture = (config.get("architectures") or [""])[0]
    ending = "ForConditionalGeneration" if family.wrapper else "ForCausalLM"
    if not architecture.endswith(ending):
        raise InputError(f"{path}: architecture '{architecture}' is no decoder-only model (…{ending})")
    whole, config = config, families.text_config(config)
    config = {**config, **family.sizes(config)}

    sizes = sizes_of(path, config, family)
    layers = sizes.layers
    own = {name: tensor for name, tensor in tensors.items() if not family.is_beside(name, config)}
    found = {block for name in own if (block := family.place(name)[0]) is not None}
    if not found and (bare := family.blocks.partition(".")[2]) and any(n.startswith(f"{bare}.0.") for n in tensors):
        raise InputError(
            f"{path}: the weights name their blocks {bare}.…, as a model without its output head does: write them as "
            f"{family.blocks}.…: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and copy "
            f"the tokenizer's files"
        )
    if found != set(range(layers)):
        where = f"{len(found)} blocks named {family.blocks}.…"
        raise InputError(f"{path}: num_hidden_layers is {layers}, and the weights hold {where}; download it again")
    has_head = f"{family.head}.weight" in tensors
    if not has_head and whole.get("tie_word_embeddings") is False:
        raise InputError(f"{folder}: {family.head}.weight is missing, and config.json says that it is not tied")
    tied = not has_head or ties_embeddings(whole)
    # A tied head that was saved all the same is the same tensor once more.
    counted = [tensor for tensor in tensors.values() if not (tied and tensor.name == f"{family.head}.weight")]
    if not any(tensor.dtype in _DTYPE_NAMES for tensor in counted):
        raise InputError(f"{folder}: holds no floating point weights")
    by_dtype = Counter()
    for tensor in counted:
        by_dtype[tensor.dtype] += tensor.end - tensor.begin
    dtype = by_dtype.most_common(1)[0][0]
    experts = _experts(path, family, config, own)
    return ModelFacts(
        architecture=architecture,
        model_type=family.model_type,
        layers=layers,
        hidden_size=sizes.hidden,
        intermediate_size=experts.pop("neurons", 0) or sizes.ffn,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.positions,
        tied_embeddings=tied,
        parameters=sum(math.prod(tensor.shape) for tensor in counted),
        bytes=sum(by_dtype.values()),
        dtype=_DTYPE_NAMES.get(dtype, dtype.lower()),
        linears=_linears(path, family, own),
        head_numbers=family.attention.head_numbers(config, sizes.head_dim),
        latent_numbers=family.attention.latent_numbers(config),
        beside=sum(math.prod(tensor.shape) for tensor in counted if tensor.name not in own),
        state_bytes=family.recurrent.state(config).bytes if family.recurrent else 0,
        **experts,
    )


def _experts(path: Path, family: Family, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, int]:
    """The facts of a model's experts; {} where none of its blocks has any.

    Raises:
        InputError: a field of the config is no number, or the weights hold another number of experts than it says.
    """
    part = family.experts
    found: dict[tuple[int, str], set[str]] = {}
    for name in tensors:
        if expert := family.expert(name):
            found.setdefault((family.place(name)[0], expert[1]), set()).add(expert[0])
    if part is None or not found:
        return {}
    count, chosen, size = experts_of(path, config, family)
    for (block, tensor), numbers in sorted(found.items()):
        if numbers != {str(n) for n in range(count)}:
            what = f"block {block} has {tensor} of {len(numbers)} experts"
            raise InputError(f"{path}: {part.count(config)[0]} is {count}, and {what}; download it again")
    widest = max(config["intermediate_size"], part.neurons_of_a_token(config)) if family.mlp else 0
    neurons = widest or part.neurons_of_a_token(config)
    return {"experts": count, "experts_per_token": chosen, "expert_size": size, "neurons": neurons}


def _linears(path: Path, family: Family, tensors: dict[str, Tensor]) -> tuple[Linear, ...]:
    found = []
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        block, within = family.place(module)
        if module == name or len(tensor.shape) != 2 or block is None:
            continue
        if within in family.attention.norms_of_heads or family.stays_plain(module):
            continue
        if family.layer(module) is None:  # another build under a name that is known
            raise InputError(
                f"{path}: a '{family.model_type}' has no {name}, which the weights hold: it is built in a way that "
                f"is not described; give another model"
            )
        found.append(Linear(module, *tensor.shape))
    return tuple(found)
