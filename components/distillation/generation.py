"""Text by the teacher itself, where text is scarce: what a student should learn is what its teacher would say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab import progress
from trimtab.components.distillation import data
from trimtab.errors import InputError
from trimtab.runtime import checkpoint as checkpoints
from trimtab.runtime import decode, fewer_kernels

#: How tokens are drawn: from the likeliest `TOP_K`, of these from the likeliest that have `TOP_P` of the mass.
TEMPERATURE, TOP_K, TOP_P = 1.0, 256, 0.95
#: Tokens of the recipe's text that a window begins with; at most a quarter of it.
PROMPT_TOKENS = 16
#: Windows generated at once, at most, and the bytes of KV cache that they may take.
WINDOWS_AT_ONCE = {"cpu": 16, "cuda": 1024}
CACHE_BYTES = 16 << 30


@torch.inference_mode()
def generate(model: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Writes `generated.safetensors` with `tokens`, int32 [windows, length], which the teacher samples.

    Each window begins with a few tokens from one of the windows for training, never from a held-out one; without a
    text, with the token that begins a document. Sampling goes on behind the end of a document, as a model was trained
    on documents packed one behind the other. On one device the same seed gives the same tokens. A kill costs one batch.

    Source: Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models".

    Args:
        parameters: `text` (a list), `length`, `generate` (tokens) and `seed` of the recipe's `distill`.

    Returns:
        windows, tokens, distinct (share of different tokens among those of the vocabulary).

    Raises:
        InputError: no text, and a tokenizer that marks no beginning or end of a document.
    """
    network, tokenizer = checkpoints.load_for_measuring(Path(model))
    if network.device.type == "cuda":
        fewer_kernels.fuse_norms(network)
        fewer_kernels.group_queries(network)
    length, seed = parameters["length"], parameters["seed"]
    count = math.ceil(parameters["generate"] / length)
    prompts = _prompts(tokenizer, parameters["text"], length, count, seed)
    at_once = min(count, _windows_at_once(network, length))
    decoder = decode.decoder(network, at_once, prompts.shape[1], length - prompts.shape[1])
    progress.report("generate", f"{count:,} windows of {length} tokens, {at_once} at once, by {decoder.path}")
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    parts = prompts.split(at_once)
    found = []
    for number, part in enumerate(progress.track(parts, "generate", "sampling the teacher's text", len(parts))):
        path = folder / f"generated-{number:05d}.safetensors"
        if not path.exists():
            tokens = _sample(decoder, part, at_once, length, network.device, (seed << 20) + number)
            save_file({"tokens": tokens.int().cpu()}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        found.append(load_file(path)["tokens"])
    tokens = torch.cat(found)
    save_file({"tokens": tokens}, Path(output) / "generated.safetensors")
    return {"windows": len(tokens), "tokens": tokens.numel(), "distinct": len(tokens.unique()) / len(tokenizer)}


def choose(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws a token of each row of logits, [n, V], by temperature, top-k and top-p; returns int64 [n, 1].

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    best, indices = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    shares = (best.float() / TEMPERATURE).softmax(-1)
    before = shares.cumsum(-1) - shares
    drawn = torch.multinomial(shares.masked_fill(before >= TOP_P, 0.0), 1, generator=generator)
    return indices.gather(-1, drawn)


def _prompts(tokenizer: Any, sources: list[str], length: int, count: int, seed: int) -> torch.Tensor:
    """Returns what the windows begin with, int64 [count, tokens]."""
    if not sources:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError(
                "distill.text: is empty, and the model's tokenizer has no token that begins or ends a document; "
                "write builtin or the path of a text"
            )
        return torch.full((count, 1), start)
    windows = data.read(tokenizer, sources, length).training
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(PROMPT_TOKENS, length // 4))
    rows = torch.randint(len(windows), (count, 1), generator=generator)
    columns = torch.randint(length - size + 1, (count, 1), generator=generator) + torch.arange(size)
    return windows[rows, columns]


def _windows_at_once(network: Any, length: int) -> int:
    config, device = network.config, network.device.type
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = 2 * config.num_hidden_layers * heads * size * length * network.dtype.itemsize
    return max(1, min(WINDOWS_AT_ONCE.get(device, 16), CACHE_BYTES // window))


def _sample(
    decoder: Any, prompts: torch.Tensor, at_once: int, length: int, device: torch.device, seed: int
) -> torch.Tensor:
    """Returns windows [n, length] that begin with the prompts [n, tokens]; the decoder works on `at_once` of them."""
    generator = torch.Generator(device).manual_seed(seed)
    full = prompts.repeat(math.ceil(at_once / len(prompts)), 1)[:at_once].to(device)
    decoder.prefill(full)
    sampled = decoder.steps(length - full.shape[1], lambda logits: choose(logits, generator))
    return torch.cat([full, sampled], dim=1)[: len(prompts)]
