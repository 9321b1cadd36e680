"""Models with random weights, for speed, memory and time: in the shape of a known model, with a tokenizer of bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
EIGHT_BILLION = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}  # fmt: skip
#: What the hub's shards hold at most, in bytes.
FILE_BYTES = 5 * 10**9
#: Random numbers that all tensors are cut from, each from another place: drawing 8 billion takes longer than writing
#: them. Coprime to every row, so that no two rows are alike.
POOL = (1 << 24) + 3


def random_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Writes a Llama of that shape in bfloat16, in files as the hub has them, a piece of a tensor at a time.

    Args:
        folder: made here.
        shape: what config.json says of the model's sizes, as `SMALL` does.
    """
    folder.mkdir()
    drawn = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * 0.02
    pool = (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # BF16 is the upper half of a float32
    ones = np.full(shape["hidden_size"], 0x3F80, np.uint16).tobytes()
    files = list(_files(_tensors(shape)))
    weight_map, begin = {}, 0
    for number, tensors in enumerate(files, start=1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with path.open("wb") as file:
            file.write(_header(tensors))
            for name, dimensions in tensors.items():
                weight_map[name] = path.name
                left = 2 * math.prod(dimensions)
                if len(dimensions) == 1:
                    file.write(ones)
                    continue
                while left:
                    left -= file.write(memoryview(pool)[begin : begin + left])
                    begin = 0 if left else (begin + 2 * 1_000_003) % len(pool)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(shape)), encoding="utf-8")
    _write_tokenizer(folder)
    return folder


def _config(shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def _tensors(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor."""
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(shape["num_hidden_layers"]):
        block = f"model.layers.{number}"
        found |= {f"{block}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            found[f"{block}.self_attn.{name}_proj.weight"] = (rows, hidden)
        found |= {f"{block}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    found["model.norm.weight"] = (hidden,)
    return found if shape["tie_word_embeddings"] else found | {"lm_head.weight": (vocabulary, hidden)}


def _files(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yields what each file holds."""
    held: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, dimensions in tensors.items():
        if held and size + 2 * math.prod(dimensions) > FILE_BYTES:
            yield held
            held, size = {}, 0
        held[name] = dimensions
        size += 2 * math.prod(dimensions)
    yield held


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    entries, end = {}, 0
    for name, dimensions in tensors.items():
        begin, end = end, end + 2 * math.prod(dimensions)
        entries[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
