"""A loss behind the output head, some tokens at a time: logits of a whole batch would be the largest tensor by far.

A batch of 16,384 tokens and a vocabulary of 49,152 have 3.2 GB of float32 logits, of which a loss and its gradient
hold several copies. Here the head's product, the loss and its gradient are done for one chunk of tokens after the
other, and only the gradients of the hidden states and of the head are kept. Source of the idea: Hsu et al. 2024,
"Liger Kernel: Efficient Triton Kernels for LLM Training", section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Bytes of one float32 copy of a chunk's logits, by device type: a cache's on a CPU, a kernel's worth on a GPU.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}

#: The head's products [n, V] and the chunk's rows of every input -> the chunk's loss, a scalar, summed over tokens.
ChunkLoss = Callable[..., torch.Tensor]


def loss_in_chunks(
    hidden: torch.Tensor, head: nn.Linear, chunk_loss: ChunkLoss, *inputs: torch.Tensor
) -> torch.Tensor:
    """Returns the sum of `chunk_loss` over tokens, differentiable in the hidden states and the head.

    Args:
        hidden: last hidden states [n, h].
        head: the output embedding.
        chunk_loss: called as chunk_loss(products, *rows of inputs); what a model does behind its head is in it.
        inputs: tensors [n, ...] without gradient.
    """
    size = max(1, CHUNK_BYTES.get(hidden.device.type, 32 << 20) // (4 * len(head.weight)))
    differentiable = torch.is_grad_enabled()
    return _InChunks.apply(chunk_loss, size, differentiable, hidden, head.weight, head.bias, *inputs)


class _InChunks(torch.autograd.Function):
    """Computes the gradients beside the loss: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: ChunkLoss,
        size: int,
        differentiable: bool,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if differentiable else None
        # Sums over chunks are float32: there may be many, and bfloat16 has eight bits.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if differentiable else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if differentiable and bias is not None else None
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            logits = F.linear(hidden[here], weight, bias)
            rows = [tensor[here] for tensor in inputs]
            if not differentiable:
                total += chunk_loss(logits, *rows)
                continue
            logits.requires_grad_()
            with torch.enable_grad():
                loss = chunk_loss(logits, *rows)
            (gradient,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            to_hidden[here] = gradient @ weight
            to_weight += gradient.t() @ hidden[here]
            if to_bias is not None:
                to_bias += gradient.sum(0)
        if differentiable:
            to_bias = None if bias is None else to_bias.to(bias.dtype)
            ctx.save_for_backward(to_hidden, to_weight.to(weight.dtype), to_bias)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        scaled = (None if gradient is None else gradient * scale for gradient in (to_hidden, to_weight, to_bias))
        return None, None, None, *scaled, *[None] * (len(ctx.needs_input_grad) - 6)
