"""Fewer and cheaper kernels a decoding step on a GPU, where a small kernel's launch costs more than its work.

Both replacements compute what they replace: one is tried against it, the other is the same product in another shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "trimtab_grouped"


class FusedRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) in one kernel instead of seven."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Replaces every RMSNorm that computes what PyTorch's does, found by trying, and returns how many."""
    found = 0
    for name, module in list(model.named_modules()):
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or epsilon is None or weight is None or weight.dim() != 1:
            continue
        fused = FusedRMSNorm(weight, epsilon)
        x = torch.linspace(-3, 5, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
        expected = module(x).float()
        if (fused(x).float() - expected).abs().max() <= 0.01 * expected.abs().max():  # bfloat16 rounds to 0.004
            model.set_submodule(name, fused)
            found += 1
    return found


def cap_scores(model: PreTrainedModel) -> None:
    """Makes a model that caps the scores of its attention do so: transformers' SDPA leaves the cap out in silence."""
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        _use_grouped(model)


def group_queries(model: PreTrainedModel) -> None:
    """Makes a model that uses SDPA decode without repeating its keys and values for each query head."""
    if model.config._attn_implementation == "sdpa":
        _use_grouped(model)


def _use_grouped(model: PreTrainedModel) -> None:
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, or `capped_attention` where a model caps its scores; for one token, [B, H, 1, D], the query
    heads that share a head of keys stand where several queries would, [B, K, H / K, D]: with a mask, transformers
    copies keys and values H / K times instead.

    Returns [B, 1, H, D].
    """
    if softcap is not None:
        return capped_attention(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    batch, heads, length, size = query.shape
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    if length != 1 or heads == key.shape[1] or per_head or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]]
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, size), None


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    cap: float,
) -> torch.Tensor:
    """Attention whose scores s are `cap` * tanh(s / `cap`) (Gemma 2: Gemma Team 2024, arXiv 2408.00118, section 2).

    Args:
        query: [B, H, L, D]; `key` and `value` are [B, K, S, D], and K divides H.
        mask: bool, True where a query may look, or what is added to the scores, [B or 1, 1, L, S or more]; None is
            causal.
        scaling: of the scores, before the cap; None is 1 / sqrt(D).

    Returns:
        [B, H, L, D].
    """
    batch, heads, length, size = query.shape
    seen = key.shape[2]
    grouped = query.reshape(batch, key.shape[1], -1, length, size)
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
    scores = cap * torch.tanh(scores.float() / cap)
    if mask is None:
        mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)[None, None]
    mask = mask[..., :seen][:, :, None]
    if mask.dtype == torch.bool:  # not minus infinity: what padding computes is nobody's, but must be a number
        mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
    scores = scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value[:, :, None]).reshape(batch, heads, length, -1)
