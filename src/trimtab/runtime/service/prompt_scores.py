"""The log-probabilities of a prompt's own tokens, where a request asks for them: OpenAI's `echo` with `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trimtab.families import Logits
from trimtab.runtime.decoder import head as heads
from trimtab.runtime.service.sampling import Chosen

#: Rows whose logits are in memory at a time: 128 MB of float32 for a vocabulary of 128,000.
ROWS = 256


@torch.inference_mode()
def tell(
    head: nn.Linear, hidden: torch.Tensor, targets: Sequence[int], top: int, behind: Logits = heads.AS_THEY_ARE
) -> list[Chosen]:
    """Returns each target with its log-probability in nats and the likeliest tokens with theirs.

    Computed in float32, as what validation scores is (`decoder.head`).

    Args:
        head: the output embedding.
        hidden: last hidden states at the positions that predict, [n, hidden_size].
        targets: the n tokens that follow.
        top: how many of the likeliest are told.
        behind: what becomes of the head's products.
    """
    told: list[Chosen] = []
    tokens = torch.tensor(targets, dtype=torch.int64, device=hidden.device)
    for rows, wanted in zip(hidden.split(ROWS), tokens.split(ROWS), strict=True):
        logits = torch.cat([part for _, part in heads.logit_slices(head, rows, behind)], dim=-1)
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(1, wanted[:, None])[:, 0].tolist()
        values, indices = log_probs.topk(max(1, top), dim=-1)
        for token, logprob, names, log_ps in zip(wanted.tolist(), own, indices.tolist(), values.tolist(), strict=True):
            told.append(Chosen(token, logprob, list(zip(names, log_ps, strict=True))[:top]))
    return told
