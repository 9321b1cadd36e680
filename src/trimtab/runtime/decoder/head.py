"""The output head, applied only where a token is scored, in float32.

The vocabulary's matrix is a large share of a small model's work, and bfloat16 logits between 16 and 32 are
0.125 apart, too coarse for a sum of log-probabilities. So the rows that matter are gathered first, and the
vocabulary passes by in slices that are widened to float32 one at a time. What a family does behind its head, such as
dividing or capping what comes out of it, is done here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.families import Logits
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.linear import cpu_products

#: Rows scored at once, and tokens of the vocabulary in a slice: 16 MB of float32 logits.
ROWS = 1024
SLICE = 4096
#: Products that are the logits.
AS_THEY_ARE = Logits()


@torch.no_grad()  # not inference_mode: what a sharded model gathers is trained later
def check(model: PreTrainedModel) -> None:
    """Checks on two tokens that the model's logits are its head's products, changed as its family says.

    Raises:
        Failure: `unsupported`, they are not.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Failure("unsupported", f"{type(head).__name__} as output head does not run on this engine")
    tokens = torch.tensor([[0, 1]], device=model.device)
    expected = model(tokens, use_cache=False).logits[0].float()
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0]
    found = torch.cat([part for _, part in logit_slices(head, hidden, behind(model))], dim=-1)
    if (found - expected).abs().max() > 0.02 * expected.abs().max():
        what = f"{type(model).__name__} changes its logits behind the output head"
        raise Failure("unsupported", f"{what}, in a way that is not described")


def behind(model: PreTrainedModel) -> Logits:
    """Returns what becomes of the products of a model's output head."""
    return family_of(model).logits(model.config.to_dict())


def changed(logits: torch.Tensor, behind: Logits) -> torch.Tensor:
    """Returns the logits of the head's products, in their type; differentiable."""
    if behind.scale != 1:
        logits = logits * behind.scale
    return logits if behind.cap is None else behind.cap * torch.tanh(logits / behind.cap)


def score(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, behind: Logits = AS_THEY_ARE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each target's log-probability in nats, float32 [n], and whether it is the likeliest, bool [n].

    Args:
        head: the output embedding, [vocabulary, hidden_size].
        hidden: last hidden states at the positions that predict, [n, hidden_size].
        targets: the tokens predicted, int64 [n].
        behind: what becomes of the head's products.
    """
    parts = [_score(head, h, t, behind) for h, t in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)]
    log_probs, likeliest = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(likeliest)


def _score(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, behind: Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(len(targets), device=targets.device)
    target_logits = hidden.new_zeros(len(targets), dtype=torch.float32)
    totals, maxima = [], []
    for start, logits in logit_slices(head, hidden, behind):
        totals.append(logits.logsumexp(-1))
        maxima.append(logits.amax(-1))
        here = (targets >= start) & (targets < start + logits.shape[1])
        target_logits[here] = logits[rows[here], targets[here] - start]
    log_probs = target_logits - torch.stack(totals).logsumexp(0)
    return log_probs, target_logits >= torch.stack(maxima).amax(0)


def predict(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, count: int, behind: Logits = AS_THEY_ARE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns each target's log-probability in nats, float32 [n], and of each position the `count` likeliest tokens,
    int64 [n, count], the likeliest first, with their log-probabilities, float32 [n, count].

    Other arguments are those of `score`; a vocabulary that is smaller than `count` is returned whole.
    """
    pieces = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    parts = [_predict(head, h, t, count, behind) for h, t in pieces]
    log_probs, tokens, best = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(tokens), torch.cat(best)


def _predict(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, count: int, behind: Logits
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, totals = torch.arange(len(targets), device=targets.device), []
    target_logits = hidden.new_zeros(len(targets), dtype=torch.float32)
    best, tokens = target_logits[:, None][:, :0], targets[:, None][:, :0]
    for start, logits in logit_slices(head, hidden, behind):
        totals.append(logits.logsumexp(-1))
        here = (targets >= start) & (targets < start + logits.shape[1])
        target_logits[here] = logits[rows[here], targets[here] - start]
        values, places = logits.topk(min(count, logits.shape[1]))
        best, order = torch.cat([best, values], 1).topk(min(count, best.shape[1] + values.shape[1]))
        tokens = torch.cat([tokens, places + start], 1).gather(1, order)
    total = torch.stack(totals).logsumexp(0)
    return target_logits - total, tokens, best - total[:, None]


def logit_slices(
    head: nn.Linear, hidden: torch.Tensor, behind: Logits = AS_THEY_ARE
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first token, float32 logits [n, at most SLICE]) over the vocabulary."""
    hidden = hidden.float()
    for start in range(0, len(head.weight), SLICE):
        weight = head.weight[start : start + SLICE]
        logits = _product(hidden, weight)
        if head.bias is not None:
            logits = logits + head.bias[start : start + SLICE].float()
        yield start, changed(logits, behind)


def _product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not hidden.is_cuda and cpu_products.dtype() == torch.float32:
        return cpu_products.exact(hidden, weight)
    with _bf16_products():
        return hidden @ weight.float().t()


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Lets oneDNN multiply float32 matrices as bfloat16 with float32 sums: exact for widened bfloat16, faster."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
