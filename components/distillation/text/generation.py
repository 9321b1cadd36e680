"""Text by the teacher itself, where text is scarce: what a student should learn is what its teacher would say."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.base import progress
from trimtab.base.errors import InputError
from trimtab.components.distillation.text import data
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.checkpoint import skeleton
from trimtab.runtime.decoder import decode
from trimtab.runtime.kernels import replacements
from trimtab.runtime.text import token_windows

#: Tokens less likely than this are not drawn, as a small model's text loses its way by them; 3e-4 is the paper's
#: middle value.
LEAST_PROBABILITY = 3e-4
#: Tokens of the recipe's text that a window begins with; at most a quarter of it.
PROMPT_TOKENS = 16
#: Windows generated at once, at most, and the bytes of KV cache that they may take.
WINDOWS_AT_ONCE = {"cpu": 16, "cuda": 1024}
CACHE_BYTES = 16 << 30
#: Tokens of each window between two looks at the clock.
TOKENS_BETWEEN_LOOKS = 32
SECONDS_BETWEEN_REPORTS = 2.0


@torch.inference_mode()
def generate(
    model: str, output: str, scratch: str, parameters: dict[str, Any], seconds: float = math.inf
) -> dict[str, float]:
    """Writes `generated.safetensors` with `tokens`, int32 [windows, length], which the teacher samples.

    Each window begins with a few tokens from one of the windows for training, never from a held-out one; without a
    text, with the token that begins a document. Sampling goes on behind the end of a document, as a model was trained
    on documents packed one behind the other. On one device the same seed gives the same tokens. A kill costs one batch.

    Source: Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models".

    Args:
        parameters: `text` (a list), `length`, `generate` (tokens) and `seed` of the recipe's `distill`.
        seconds: for sampling; the batches that are finished by then are written, possibly none.

    Returns:
        windows, tokens, distinct (share of different tokens among those of the vocabulary), tokens_per_second.

    Raises:
        InputError: no text, and a tokenizer that marks no beginning or end of a document.
    """
    network, tokenizer = checkpoints.load_for_measuring(Path(model))
    if network.device.type == "cuda":
        replacements.fuse_norms(network)
        replacements.group_queries(network)
    length, seed = parameters["length"], parameters["seed"]
    count = math.ceil(parameters["generate"] / length)
    prompts = _prompts(tokenizer, parameters["text"], length, count, seed)
    at_once = min(count, _windows_at_once(network, length))
    decoder = decode.decoder(network, at_once, prompts.shape[1], length - prompts.shape[1])
    progress.report("generate", f"{count:,} windows of {length} tokens, {at_once} at once, by {decoder.path}")
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock(count * length, seconds)
    found = [torch.empty(0, length, dtype=torch.int32)]
    for number, part in enumerate(prompts.split(at_once)):
        path = folder / f"generated-{number:05d}.safetensors"
        if not path.exists():
            tokens = _sample(decoder, part, at_once, length, network.device, (seed << 20) + number, clock)
            if tokens is None:
                progress.report("generate", f"ends after {seconds:.0f} s, before all was written")
                break
            save_file({"tokens": tokens.int().cpu()}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        found.append(load_file(path)["tokens"])
    tokens = torch.cat(found)
    save_file({"tokens": tokens}, Path(output) / "generated.safetensors")
    distinct = len(tokens.unique()) / len(tokenizer)
    return {
        "windows": len(tokens), "tokens": tokens.numel(), "distinct": distinct, "tokens_per_second": clock.speed
    }


class _Clock:
    """Tells how fast text is written, and when its time is over."""

    def __init__(self, tokens: int, seconds: float):
        self.tokens, self.started, self.told_at, self.written = tokens, time.monotonic(), 0.0, 0
        self.ends = self.started + seconds

    @property
    def speed(self) -> float:
        return self.written / max(time.monotonic() - self.started, 1e-9)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends

    def count(self, written: int) -> None:
        self.written += written
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_REPORTS:
            progress.report("generate", f"{self.speed:,.0f} tokens/s", self.written, self.tokens)
            self.told_at = time.monotonic()


def choose(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws a token of each row of logits, [n, V], from those that are likely enough; returns int64 [n, 1].

    Nothing is sorted: a top-k of 1,024 rows of a vocabulary takes a GPU as long as a small model's whole step. The
    token is the argmax of p / e with e exponentially distributed, which is drawn as often as it is likely.

    Source: Hewitt et al. 2022, "Truncation Sampling as Language Model Desmoothing" (arXiv 2210.15191), epsilon
    sampling; Gumbel 1954, "Statistical Theory of Extreme Values", the draw by an argmax.
    """
    p = logits.float().softmax(-1)
    least = p.amax(-1, keepdim=True).clamp_max(LEAST_PROBABILITY)
    draws = torch.empty_like(p).exponential_(generator=generator)
    return (p / draws).masked_fill_(p < least, 0.0).argmax(-1, keepdim=True)


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
    size, begun = max(1, min(PROMPT_TOKENS, length // 4)), len(token_windows.prefix(tokenizer))
    rows = torch.randint(len(windows), (count, 1), generator=generator)
    columns = begun + torch.randint(length - begun - size + 1, (count, 1), generator=generator) + torch.arange(size)
    return token_windows.begin(tokenizer, windows[rows, columns])


def _windows_at_once(network: Any, length: int) -> int:
    """How many windows' keys, values and states take `CACHE_BYTES`, block by block as the model has them."""
    config, device = network.config, network.device.type
    family = skeleton.family_of(network)
    own = config.to_dict()
    parts = family.parts(own | dict(family.sizes(own)))
    window = 0
    if attending := sum("attention" in part for part in parts):
        queries = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or queries
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        numbers = heads * family.attention.head_numbers(own, size)
        window = attending * numbers * length * network.dtype.itemsize
    if recurrent := sum("recurrent" in part for part in parts):
        window += recurrent * family.recurrent.state(own).bytes
    return max(1, min(WINDOWS_AT_ONCE.get(device, 16), CACHE_BYTES // window))


def _sample(
    decoder: Any, prompts: torch.Tensor, at_once: int, length: int, device: torch.device, seed: int, clock: _Clock
) -> torch.Tensor | None:
    """Returns windows [n, length] that begin with the prompts [n, tokens], or None where the time is over.

    The decoder works on `at_once` of them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parts = [prompts.repeat(math.ceil(at_once / len(prompts)), 1)[:at_once].to(device)]
    decoder.prefill(parts[0])
    done = parts[0].shape[1]
    while done < length:
        if clock.is_over:
            return None
        steps = min(TOKENS_BETWEEN_LOOKS, length - done)
        parts.append(decoder.steps(steps, lambda logits: choose(logits, generator)))
        done += steps
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.count(len(prompts) * steps)
    return torch.cat(parts, dim=1)[: len(prompts)]
