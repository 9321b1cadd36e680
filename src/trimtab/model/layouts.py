"""The house's layout of a model's weights, and how what a source stores becomes it: from config.json and headers alone.

The layout: safetensors of 16 or 32 bits, one matrix `<expert>.weight` for each linear layer of each expert, under the
names that checkpoints publish; a text model inside a wrapper under the names of transformers 5. Fetching writes it,
planning reads the same facts before that.

Forms that become it, all as transformers 5.14 loads them:

| what a source stores | where | becomes |
|---|---|---|
| FP8 or MXFP4 with scales | `trimtab.model.low_precision` | BF16 |
| `….experts.gate_up_proj` [E, 2I, H], `down_proj` [E, H, I] | Qwen3.5, Gemma 4 | `….experts.<e>.gate_proj.weight` [I, H], `up_proj`, `down_proj` [H, I] |
| the same transposed: [E, H, 2I], [E, I, H] | Llama 4 | the same |
| transposed, gate and up in turns, biases | gpt-oss | the same, and `….experts.<e>.gate_proj.bias` |
| `….block_sparse_moe.input_linear.weight`, `output_linear.weight` | Granite 4 | `….block_sparse_moe.experts.<e>.gate_proj.weight` |
| the same | Granite 3 | `….block_sparse_moe.experts.<e>.w1.weight`, `w3`, `w2`, as vLLM reads them |
| `language_model.model.…` | Gemma 3, Mistral 3, LLaVA | `model.language_model.…` |
| `model.layers.…`, `visual.…` | Qwen2.5-VL | `model.language_model.layers.…`, `model.visual.…` |
| `h.0.…`, `word_embeddings.…`, `ln_f.…` | BLOOM, GPT-2 | `transformer.h.0.…` and so on |
| `….c_attn.weight` [H, 3H], `c_proj`, `c_fc` (Conv1D) | GPT-2 | the transposed of GPTBigCode, with the rows of `c_attn` head by head |
"""  # noqa: E501

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.base.errors import InputError
from trimtab.model import low_precision
from trimtab.model.headers import DTYPE_BYTES, Tensor
from trimtab.model.low_precision import Native, Stored

#: Raise it when a source becomes other tensors than before: what was converted is found by its content and by this.
VERSION = 2
#: In the metadata of a model's tree: what its source stored otherwise, in sentences.
CONVERTED = "converted"
_STACKED = re.compile(r"(.+\.experts)\.(gate_up|gate|up|down)_proj(?:\.(weight)|(_bias|\.bias))?$")
_GRANITE = re.compile(r"(.+\.block_sparse_moe)\.(input|output)_linear\.weight$")
#: Experts stored [inputs, outputs]: those of transformers' classes that multiply by the matrix, not by its transpose.
_TRANSPOSED = {"gpt_oss", "llama4_text", "qwen3_vl_moe_text"}
#: Experts whose layers have other names than `gate_proj`, `up_proj` and `down_proj`.
_OF_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_NAMES = {"granitemoe": _OF_MIXTRAL, "granitemoeshared": _OF_MIXTRAL}
#: Experts whose gate and up stand in turns; in the others all of gate comes first.
_IN_TURNS = {"gpt_oss"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)$")
#: Prefixes of transformers before 5 and those of 5, by `conversion_mapping.py`. Llama 4's are the same in both.
_LLAVA = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_LLAVA_NEXT = {**_LLAVA, "image_newline": "model.image_newline"}
#: The first that fits counts: names of 5 stay.
_QWEN_VL = {
    "model.language_model.": "model.language_model.",
    "model.visual.": "model.visual.",
    "model.": "model.language_model.",
    "visual.": "model.visual.",
}
_PREFIXES = {
    "qwen2_5_vl": _QWEN_VL,
    **dict.fromkeys(("llava", "gemma3", "mistral3", "aya_vision", "paligemma", "internvl", "vipllava"), _LLAVA),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _LLAVA_NEXT),
    "gpt2": {name: f"transformer.{name}" for name in ("h.", "wte.", "wpe.", "ln_f.")},
    # Published BLOOM is the body alone, saved without the name that it has in a model with a head.
    "bloom": {name: f"transformer.{name}" for name in ("h.", "word_embeddings", "ln_f.")},
}


#: Of GPT-2: what it stores as [inputs, outputs], and masks of attention that are no weights.
_CONV1D = re.compile(r".+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_MASK = re.compile(r".*\.attn\.(?:masked_)?bias$")


class Piece(NamedTuple):
    """A tensor of the layout, and how it is made of what is stored: decoded, then one expert of it, transposed if it
    is so stored, and of that these rows (start, stop, step); rows of queries, keys and values are put together head by
    head where `heads` counts these."""

    tensor: Tensor
    stored: Stored
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    heads: int = 0

    @property
    def copied(self) -> bool:
        """Whether it is stored as it is, perhaps under another name."""
        return not (self.stored.decode or self.transposed or self.heads) and self.expert is None


class Layout(NamedTuple):
    """A model's tensors in the house's layout by name; what of the source is no weight; what is said of both."""

    pieces: dict[str, Piece]
    left_out: tuple[str, ...]
    sentences: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: piece.tensor for name, piece in self.pieces.items()}

    @property
    def as_stored(self) -> bool:
        """Whether the source has this layout already."""
        return not self.sentences

    def source_of(self, name: str) -> str:
        """Returns the stored tensor that a tensor of the layout is made of."""
        return self.pieces[name].stored.weight


def layout(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layout:
    """Returns the house's layout of a model folder.

    Args:
        config: of its config.json.
        tensors: as its files store them, by `headers.read_tensors`.

    Raises:
        InputError: low precision in a form that is not read, a scale or an expert that is missing or of another shape,
            or two stored tensors for one of the model.
    """
    native = low_precision.declared_in(folder, config)
    found, left_out = low_precision.stored(folder, native, tensors)
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    prefixes = _PREFIXES.get(str(config.get("model_type")), {})
    pieces: dict[str, Piece] = {}
    of_gpt2 = config.get("model_type") == "gpt2"
    masks = [name for name in found if of_gpt2 and _MASK.match(name)]
    for name in masks:
        del found[name]
    for stored in found.values():
        made = _of_gpt2(config, stored, tensors) if of_gpt2 else _pieces(folder, text, stored, tensors)
        for piece in made:
            name = _renamed(piece.tensor.name, prefixes)
            if name in pieces:
                both = f"{pieces[name].stored.weight} and {stored.weight}"
                raise InputError(f"{folder}: {both} are both {name}; remove the one that is not the model's")
            pieces[name] = piece._replace(tensor=piece.tensor._replace(name=name))
    _check_experts(folder, pieces)
    sentences = [*_sentences(native, pieces, left_out)]
    if of_gpt2:
        sentences.append("layers are stored transposed (Conv1D); it becomes a GPTBigCode, which has linear layers")
    return Layout(pieces, (*left_out, *masks), tuple(sentences))


def _of_gpt2(config: Mapping[str, Any], stored: Stored, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    is_fused = ".attn.c_attn." in f".{stored.name}"
    heads = (config.get("n_head") or config.get("num_attention_heads") or 0) if is_fused else 0
    transposed = _CONV1D.match(f".{stored.name}") is not None
    if transposed or heads:
        shape = stored.shape[::-1] if transposed else stored.shape
        yield Piece(_tensor(stored.name, stored.dtype, shape), stored, transposed=transposed, heads=heads)
    else:
        yield Piece(tensors[stored.weight], stored)


def _pieces(folder: Path, text: Mapping[str, Any], stored: Stored, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    sides = len(stored.shape)
    if (match := _STACKED.match(stored.name)) and sides == (2 if match[4] else 3):
        experts, part, kind = match[1], match[2], "bias" if match[4] else "weight"
    elif (match := _GRANITE.match(stored.name)) and sides == 3:
        experts, part, kind = f"{match[1]}.experts", "gate_up" if match[2] == "input" else "down", "weight"
    else:
        copied = not stored.decode and tensors[stored.weight]
        yield Piece(copied or _tensor(stored.name, stored.dtype, stored.shape), stored)
        return
    model_type = text.get("model_type")
    # Blocks of MXFP4 stand along the inputs, so they are stored as rows of outputs, also where 16 bits are not.
    transposed = kind == "weight" and model_type in _TRANSPOSED and stored.decode != "mxfp4"
    count, *shape = stored.shape
    outputs, *inputs = reversed(shape) if transposed else shape
    _check_shape(folder, text, stored, part, outputs, inputs)
    if part != "gate_up":
        halves = {part: None}
    elif model_type in _IN_TURNS:
        halves = {"gate": (0, outputs, 2), "up": (1, outputs, 2)}
    else:
        halves = {"gate": (0, outputs // 2, 1), "up": (outputs // 2, outputs, 1)}
    names = _NAMES.get(str(model_type), {})
    for expert in range(count):
        for half, rows in halves.items():
            name = f"{experts}.{expert}.{names.get(half, f'{half}_proj')}.{kind}"
            size = outputs // 2 if rows else outputs
            yield Piece(_tensor(name, stored.dtype, (size, *inputs)), stored, expert, transposed, rows)


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, dtype, shape, 0, math.prod(shape) * DTYPE_BYTES[dtype])


def _check_shape(
    folder: Path, text: Mapping[str, Any], stored: Stored, part: str, outputs: int, inputs: list[int]
) -> None:
    """Experts of another orientation would be read as others of the same size."""
    hidden = text.get("hidden_size")
    side = outputs if part == "down" else next(iter(inputs), hidden)
    if side != hidden or (part == "gate_up" and outputs % 2):
        model_type = text.get("model_type")
        raise InputError(
            f"{folder}: {stored.name} has the shape {[*stored.shape]}, which is none of the experts of a "
            f"'{model_type}' with hidden_size {hidden}; download it again"
        )


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    before = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(before, "") + name[len(before) :]


def _check_experts(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Each as the first one; how many there are is compared with the config where its family is known."""
    groups: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, piece in pieces.items():
        if match := _EXPERT.match(name):
            groups[match[1]][int(match[2])][match[3]] = piece.tensor.shape
    for group, experts in groups.items():
        first = experts[min(experts)]
        for number, parts in experts.items():
            if other := {*parts.items()} ^ {*first.items()}:
                name = f"{group}.{number}.{min(part for part, _ in other)}"
                raise InputError(f"{folder}: {name} is not as that of the first expert; download it again")


def _sentences(native: Native | None, pieces: Mapping[str, Piece], left_out: tuple[str, ...]) -> Iterator[str]:
    if native:
        yield native.sentence
    if any(piece.expert is not None for piece in pieces.values()):
        yield "experts are stored in one tensor for all; each becomes tensors of its own"
    if old := next((piece for name, piece in pieces.items() if piece.copied and piece.stored.name != name), None):
        yield f"tensors have names of transformers before 5, such as {old.stored.name}; they become {old.tensor.name}"
    if left_out:
        yield f"{len(left_out)} scales of activations, such as {left_out[0]}, are left out"
