"""When the answers of two engines are the same: kernels add up in another order, so ties fall either way."""

from __future__ import annotations

import torch

from trimtab.runtime.decoder.step import shaken
from trimtab.runtime.engines.torch_engine import TorchEngine

#: Of the largest logit: what products in bfloat16 may move one by.
TIE = 0.02


@torch.inference_mode()
def assert_same(found: list[list[int]], right: list[list[int]], prompts: list[list[int]], judge: TorchEngine) -> None:
    """Answers are equal, or every token of one that parts is the judge's likeliest behind those before it, or ties.

    In bfloat16 a product's last bit depends on how many rows it has, so ties fall either way, and behind one the texts
    differ: how many do depends on the processor. What is rounded to 8 bits then falls to another neighbour, and logits
    go further; how far, the judge tells, where what its blocks read is off by a bit.
    """
    ends = judge.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    for prompt, ours, theirs in zip(prompts, found, right, strict=True):
        if ours == theirs:
            continue
        answer = ours + ends[:1] if len(ours) < len(theirs) else ours  # one that ends is told without its end
        logits = _logits(judge, prompt, answer)
        with shaken(judge.model):
            moved = (_logits(judge, prompt, answer) - logits).abs().max()
        behind = logits.amax(-1) - logits[range(len(answer)), answer]
        allowed = (TIE * logits.abs().amax(-1)).clamp_min(moved)
        assert (behind <= allowed).all(), f"{behind.tolist()} behind, {allowed.tolist()} allowed"


def _logits(judge: TorchEngine, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits of each token of an answer, [tokens, vocabulary]."""
    return judge.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
