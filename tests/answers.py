"""When the answers of two engines are the same: kernels add up in another order, so ties fall either way."""

from __future__ import annotations

from itertools import zip_longest

import torch

from trimtab.runtime.engines.torch_engine import TorchEngine


@torch.inference_mode()
def assert_same(found: list[list[int]], right: list[list[int]], prompts: list[list[int]], judge: TorchEngine) -> None:
    """Half of the answers at least are equal, and where one parts, it parts at a tie of the judge's logits.

    In bfloat16 a product's last bit depends on how many rows it has, so ties fall either way.
    """
    parted = [i for i in range(len(right)) if found[i] != right[i]]
    assert len(parted) <= len(right) // 2
    for i in parted:
        ends = judge.model.generation_config.eos_token_id  # an answer that ends is told without it
        end = ends[0] if isinstance(ends, list) else ends
        place, one, other = next(
            (n, a, b) for n, (a, b) in enumerate(zip_longest(found[i], right[i], fillvalue=end)) if a != b
        )
        logits = judge.model(torch.tensor([prompts[i] + right[i][:place]])).logits[0, -1].float()
        gap = logits[one] - logits[other]
        assert abs(gap) <= 0.02 * logits.abs().max()
