"""Which files of a folder are the model: the one opinion that fetching, planning and every stage share.

The index names the shards, where all of them are there; else `model.safetensors` holds the weights. What lies beside
them is not the model, and engines that read every *.safetensors of a folder would load it: Mistral's own
`consolidated.safetensors`, a shard that an older index named, a single file beside the shards. So it is left out, and
named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.base.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
#: What is part of a model beside its weights: configs, tokenizer, chat template.
COMPANIONS = (".json", ".model", ".txt", ".jinja")
#: Weights in files that can run code when they are loaded.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
#: Files beside quantized weights: of ModelOpt, AutoGPTQ and AutoAWQ.
_QUANTIZED_BY = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
#: What stands for a tokenizer: one of these sets of files.
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
#: Tensors that old checkpoints store and transformers computes: causal masks (GPT-2's, GPT-NeoX's and CodeGen's
#: `_keys_to_ignore_on_load_unexpected`) and rotary frequencies.
_COMPUTED = re.compile(r"(?:^|\.)(?:(?:attn|attention)\.(?:bias|masked_bias|causal_mask)|rotary_emb\.inv_freq)$")


class WeightFiles(NamedTuple):
    """Where a model's weights are.

    `names` are the files; `index` says which tensor an index promises in which of them, empty without one; `left_out`
    are the files of weights beside them, which are not the model, and an index that names none of them.
    """

    names: list[str]
    index: dict[str, str]
    left_out: list[str]


def weight_files(folder: Path) -> WeightFiles:
    """Returns the files that hold the weights of a model folder; reads no more than names and the index.

    Raises:
        InputError: no safetensors, an index that cannot be read, or a shard that is missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give the one that holds {CONFIG} and *.safetensors")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    names, index = _weights(folder, [name for name in others if name.endswith(".safetensors")])
    stale = (folder / INDEX).is_file() and {*names} != {*_named(folder)}
    return WeightFiles(names, index, sorted({*others, *([INDEX] if stale else [])} - {*names}))


def companions(folder: Path) -> list[str]:
    """Returns the names of the files beside the weights that are part of the model: configs, tokenizer, template."""
    found = (path.name for path in folder.iterdir() if path.suffix in COMPANIONS and path.is_file())
    return sorted(name for name in found if not name.endswith(".safetensors.index.json"))


def model_files(folder: Path) -> list[str]:
    """Returns the names of all files of a model folder that are the model.

    Raises:
        InputError: as `weight_files`.
    """
    weights = weight_files(folder)
    indexed = weights.index and INDEX not in weights.left_out
    return [*companions(folder), *([INDEX] if indexed else []), *weights.names]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that transformers can load."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZERS)


def quantizer_file(folder: Path) -> str | None:
    """Returns the name of a file that a quantizer left beside the weights, None where there is none."""
    return next((name for name in _QUANTIZED_BY if (folder / name).is_file()), None)


def is_computed(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is one that transformers computes itself and does not read.

    A bias of a layer that is called `attention` is a vector; a causal mask is not.
    """
    return bool(_COMPUTED.search(name)) and not (name.endswith(".bias") and len(shape) == 1)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        InputError: it does not exist, or is none.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; the folder must be a Hugging Face model") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def _named(folder: Path) -> list[str]:
    """The shards that the index names."""
    return sorted({str(shard) for shard in _index(folder).values()})


def _index(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{folder / INDEX}: has no weight_map")
    return index


def _weights(folder: Path, found: list[str]) -> tuple[list[str], dict[str, str]]:
    if (folder / INDEX).is_file():
        index, shards = _index(folder), _named(folder)
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX}: '{shard}' is no name of a safetensors file beside it")
        missing = [shard for shard in shards if shard not in found]
        if not missing:
            return shards, index
        if len(missing) < len(shards) or SINGLE not in found:
            raise InputError(f"{folder}: {missing[0]} is missing, which {INDEX} names; download it")
        # Shards that were joined left their index behind: the one file must hold all that it promises.
        return [SINGLE], dict.fromkeys(index, SINGLE)
    if SINGLE in found:
        return [SINGLE], {}
    if any(name.startswith("consolidated") for name in found):
        raise InputError(
            f"{folder}: holds {found[0]}, the weights in Mistral's own form, and no {SINGLE} or {INDEX}; download "
            f"the other *.safetensors of the model too, which transformers reads"
        )
    if found:
        raise InputError(f"{folder}: holds {found[0]}, but no {SINGLE} or {INDEX}; add it")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise InputError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is loaded, and is refused; "
            f"if you trust it, convert it: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise InputError(
        f"{folder}: holds no weights; add {SINGLE}, or {INDEX} and the files it names: it must hold safetensors"
    )
