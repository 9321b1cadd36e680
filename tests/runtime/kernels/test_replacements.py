"""What replaces kernels computes what they did; on a GPU the engines use it, here it is tried by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab.runtime.decoder import decode
from trimtab.runtime.kernels import replacements
from trimtab.runtime.kernels.replacements import FusedRMSNorm, fuse_norms, grouped_attention


@torch.inference_mode()
def test_norms_are_replaced_and_logits_stay(original: torch.nn.Module, windows: torch.Tensor) -> None:
    expected = original(windows).logits
    assert fuse_norms(original) == 5  # two a block, and the last
    assert sum(isinstance(module, FusedRMSNorm) for module in original.modules()) == 5
    assert torch.allclose(original(windows).logits, expected, atol=1e-4)


def test_a_norm_of_another_kind_stays() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    model = nn.Sequential(GemmaRMSNorm(8))
    nn.init.constant_(model[0].weight, 0.5)  # it multiplies by 1.5
    assert fuse_norms(model) == 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_grouped_attention_is_sdpa(original: torch.nn.Module, masked: bool, length: int) -> None:
    torch.manual_seed(0)
    module = original.model.layers[0].self_attn
    query, key, value = torch.randn(2, 4, length, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.rand(2, 1, length, 9) < 0.7 if masked else None
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.25)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.25)
    assert found.shape == (2, length, 4, 16)
    assert torch.allclose(found, expected, atol=1e-6)


@torch.inference_mode()
def test_decoding_with_grouped_queries_gives_the_same_tokens(original: torch.nn.Module, windows: torch.Tensor) -> None:
    plain = decode.Static(original, 6, 8, 12)
    plain.prefill(windows[:, :8])
    expected = plain.steps(12)
    replacements.group_queries(original)
    assert original.config._attn_implementation == "trimtab_grouped"
    for decoder in (decode.Static(original, 6, 8, 12), decode.Growing(original)):
        decoder.prefill(windows[:, :8])
        assert torch.equal(decoder.steps(12), expected)
