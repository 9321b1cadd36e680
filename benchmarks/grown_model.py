"""A small Llama grown to any larger shape, in which it computes nearly what it did: so that a model of 8 or 32 billion
parameters has a real one's activations and scores.

The small model's weights stand in a corner of the larger one's, and all else is noise too small to matter. What must
not change is made up for: a norm divides by the mean over more channels, the logarithm of attention by a wider head,
and rotary pair i of a head goes by the frequency of its place. Blocks that are added put next to nothing out.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE
from safetensors.torch import save_file

from trimtab.model.files import companions
from trimtab.runtime.checkpoint.model_files import Export

#: The sizes of Llama-3.1-8B and of Qwen2.5-32B, whose heads and blocks hold SmolLM2-135M's.
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
#: The standard deviation of noise in units of the weights'; in the outputs of added blocks a tenth of it.
NOISE = 0.01


def grow(source: Path, folder: Path, shape: dict[str, int], noise: float = NOISE) -> int:
    """Writes a Llama of a larger shape in bfloat16, a file a block, and returns how many parameters it has.

    Args:
        source: a Llama with tied embeddings; no size of it is larger than in `shape`, nor are the heads that share a
            key, and its head_dim divides the new one.
        folder: made here.
    """
    folder.mkdir(parents=True)
    small = json.loads((source / "config.json").read_text(encoding="utf-8"))
    small.setdefault("head_dim", small["hidden_size"] // small["num_attention_heads"])
    read, place = Export(source).tensor, _Places(small, shape)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def grown(name: str, sizes: tuple[str, str], scale: float = 1.0, spread: float = noise) -> torch.Tensor:
        weight = read(name).to(DEVICE).float()
        rows, columns = (place.of[size].to(DEVICE) for size in sizes)
        deviation = float(weight.std()) * spread if spread else 0.0
        large = torch.randn(*(place.size[size] for size in sizes), generator=generator, device=DEVICE) * deviation
        large[rows[:, None], columns[None]] = weight * scale
        return large.bfloat16().cpu()

    def norm(name: str) -> torch.Tensor:
        weight = read(name).float() * math.sqrt(small["hidden_size"] / shape["hidden_size"])
        large = torch.full((shape["hidden_size"],), float(weight.mean()))
        large[: len(weight)] = weight
        return large.bfloat16()

    embedding = read("model.embed_tokens.weight")
    place.of["vocabulary"], place.size["vocabulary"] = torch.arange(len(embedding)), len(embedding)
    outside = {
        "model.embed_tokens.weight": grown("model.embed_tokens.weight", ("vocabulary", "hidden"), spread=0.0),
        "model.norm.weight": norm("model.norm.weight"),
    }
    files = [outside]
    parameters = _write(folder, 0, outside, shape["num_hidden_layers"])
    for number in range(shape["num_hidden_layers"]):
        block = _block(number, min(number, small["num_hidden_layers"] - 1), place, grown, norm)
        if number >= small["num_hidden_layers"]:
            for name in (f"model.layers.{number}.{end}.weight" for end in ("self_attn.o_proj", "mlp.down_proj")):
                drawn = torch.randn(block[name].shape, generator=generator, device=DEVICE)
                block[name] = (drawn * float(block[name].float().std()) * noise * 0.1).bfloat16().cpu()
        parameters += _write(folder, number + 1, block, shape["num_hidden_layers"])
        files.append(dict.fromkeys(block))
    names = [_file(number, len(files)) for number in range(len(files))]
    weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    epsilon = small["rms_norm_eps"] * small["hidden_size"] / shape["hidden_size"]
    config = {**small, **shape, "rms_norm_eps": epsilon, "torch_dtype": "bfloat16"}
    for name in companions(source):
        shutil.copyfile(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return parameters


class _Places:
    """Where rows and columns of the small model stand in the large one's, and how many there are, by what they are."""

    def __init__(self, small: dict[str, Any], large: dict[str, int]):
        heads, keys, width = (large[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        old_heads, old_keys, old_width = (
            small[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        half, step = torch.arange(old_width // 2), width // old_width
        within = torch.cat([half * step, width // 2 + half * step])
        shared, group = old_heads // old_keys, heads // keys
        assert width % old_width == 0 and group >= shared and keys >= old_keys, "the small model's heads do not fit"
        number = torch.arange(old_heads)
        queries = number // shared * group + number % shared
        self.of = {
            "hidden": torch.arange(small["hidden_size"]),
            "ffn": torch.arange(small["intermediate_size"]),
            "queries": (queries[:, None] * width + within).flatten(),
            "keys": (torch.arange(old_keys)[:, None] * width + within).flatten(),
        }
        self.size = {
            "hidden": large["hidden_size"],
            "ffn": large["intermediate_size"],
            "queries": heads * width,
            "keys": keys * width,
        }
        #: What queries are multiplied by, for the product with a key is divided by the root of the width.
        self.sharper = math.sqrt(step)


def _block(
    number: int,
    like: int,
    place: _Places,
    grown: Callable[..., torch.Tensor],
    norm: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    here, there = f"model.layers.{number}.", f"model.layers.{like}."
    found = {f"{here}{name}.weight": norm(f"{there}{name}.weight") for name in
             ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    for name, sizes, scale in (
        ("self_attn.q_proj", ("queries", "hidden"), place.sharper),
        ("self_attn.k_proj", ("keys", "hidden"), 1.0),
        ("self_attn.v_proj", ("keys", "hidden"), 1.0),
        ("self_attn.o_proj", ("hidden", "queries"), 1.0),
        ("mlp.gate_proj", ("ffn", "hidden"), 1.0),
        ("mlp.up_proj", ("ffn", "hidden"), 1.0),
        ("mlp.down_proj", ("hidden", "ffn"), 1.0),
    ):
        found[f"{here}{name}.weight"] = grown(f"{there}{name}.weight", sizes, scale)
    return found


def _write(folder: Path, number: int, tensors: dict[str, torch.Tensor], blocks: int) -> int:
    save_file(tensors, folder / _file(number, blocks + 1), metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _file(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
