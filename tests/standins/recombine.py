"""Puts the ranks of a TensorRT-LLM checkpoint together again, under the names of Hugging Face's Llama.

Written from TensorRT-LLM's checkpoint format, not from trimtab's code: it is what a conversion is judged by.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
COLUMN = {"mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj"}
ROW = {"attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}


def recombine(folder: Path, pattern: str = "rank{}.safetensors") -> dict[str, torch.Tensor]:
    """Returns {Hugging Face's layer}.{TensorRT-LLM's name of the part} -> tensor, whole."""
    document = json.loads((folder / "config.json").read_text())
    config = document.get("pretrained_config", document)
    mapping = config["mapping"]
    tp, pp = mapping["tp_size"], mapping["pp_size"]
    assert mapping["world_size"] == tp * pp
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    ranks = [load_file(folder / pattern.format(rank)) for rank in range(tp * pp)]
    blocks = config["num_hidden_layers"] // pp
    found: dict[str, torch.Tensor] = {}
    for stage in range(pp):
        parts = ranks[stage * tp : (stage + 1) * tp]
        assert all(part.keys() == parts[0].keys() for part in parts)
        for name in parts[0]:
            tensors = [part[name] for part in parts]
            if not name.startswith("transformer.layers."):
                target = {"transformer.vocab_embedding": "model.embed_tokens", "transformer.ln_f": "model.norm"}
                module, _, part = name.rpartition(".")
                whole = tensors[0] if module == "transformer.ln_f" else torch.cat(tensors)[: config["vocab_size"]]
                found[f"{target.get(module, module)}.{part}"] = whole
                continue
            _, _, number, rest = name.split(".", 3)
            block, (module, _, part) = f"model.layers.{stage * blocks + int(number)}", rest.rpartition(".")
            if module in NORMS:
                found[f"{block}.{NORMS[module]}.{part}"] = _same(tensors)
            elif module == "attention":
                found[f"{block}.self_attn.{part}"] = _same(tensors)
            elif module in COLUMN:
                found[f"{block}.{COLUMN[module]}.{part}"] = _column(part, tensors)
            elif module in ROW:
                found[f"{block}.{ROW[module]}.{part}"] = _row(part, tensors)
            else:
                assert module == "attention.qkv"
                for key, value in _qkv(part, tensors, heads, kv_heads, tp).items():
                    found[f"{block}.self_attn.{key}_proj.{part}"] = value
    return found


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    kind = tensors[0].dtype
    if kind == torch.float8_e4m3fn:
        return torch.cat([t.view(torch.uint8) for t in tensors], dim).view(kind)
    return torch.cat(tensors, dim)


def _same(tensors: list[torch.Tensor]) -> torch.Tensor:
    assert all(torch.equal(tensor.view(torch.uint8), tensors[0].view(torch.uint8)) for tensor in tensors)
    return tensors[0]


def _column(part: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    if part == "prequant_scaling_factor" or tensors[0].numel() == 1:
        return _same(tensors)
    return _cat(tensors)


def _row(part: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].dim() == 1 and part != "prequant_scaling_factor":
        return _same(tensors)
    return _cat(tensors, -1)


def _qkv(
    part: str, tensors: list[torch.Tensor], heads: int, kv_heads: int, tp: int
) -> dict[str, torch.Tensor]:
    if part == "prequant_scaling_factor" or tensors[0].numel() == 1:
        return dict.fromkeys("qkv", _same(tensors))
    own_q, own_kv, copies = heads // tp, max(1, kv_heads // tp), max(1, tp // kv_heads)
    head = tensors[0].shape[0] // (own_q + 2 * own_kv)
    split = [tensor.split([own_q * head, own_kv * head, own_kv * head]) for tensor in tensors]
    for first in range(0, tp, copies):
        for other in range(first, first + copies):
            assert all(_same([split[first][i], split[other][i]]) is not None for i in (1, 2))
    kept = {"q": split, "k": split[::copies], "v": split[::copies]}
    return {key: _cat([parts[i] for parts in kept[key]]) for i, key in enumerate("qkv")}
