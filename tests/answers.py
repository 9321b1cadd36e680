"""When the answers of two engines are the same: kernels add up in another order, so ties fall either way."""

from __future__ import annotations

import torch

from trimtab.runtime.engines.torch_engine import TorchEngine

#: Of the largest logit: what products in bfloat16, and activations that round to a neighbour, may move one by.
TIE = 0.02


@torch.inference_mode()
def assert_same(found: list[list[int]], right: list[list[int]], prompts: list[list[int]], judge: TorchEngine) -> None:
    """Answers are equal, or every token of one that parts is the judge's likeliest behind those before it, or ties.

    In bfloat16 a product's last bit depends on how many rows it has, so ties fall either way, and behind one the texts
    differ: how many do depends on the processor.
    """
    ends = judge.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    for prompt, ours, theirs in zip(prompts, found, right, strict=True):
        if ours == theirs:
            continue
        answer = ours + ends[:1] if len(ours) < len(theirs) else ours  # one that ends is told without its end
        logits = judge.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        behind = logits.amax(-1) - logits[range(len(answer)), answer]
        assert (behind <= TIE * logits.abs().amax(-1)).all(), (behind / logits.abs().amax(-1)).tolist()
