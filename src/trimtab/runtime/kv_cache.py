"""An FP8 KV cache, emulated: keys and values are rounded to e4m3 where attention reads them.

ModelOpt quantizes the keys after their rotary embedding, and exports `k_proj.k_scale` and `v_proj.v_scale`
where calibration measured them; TensorRT-LLM uses 1.0 where they are absent, and so does this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trimtab.errors import Failure
from trimtab.runtime.checkpoint import Export
from trimtab.runtime.formats import E4M3_MAX

_NAME = "trimtab_fp8_kv_cache"


def apply(model: PreTrainedModel, export: Export) -> None:
    """Makes a model's attention read a rounded KV cache, if its export asks for one.

    Raises:
        Failure: `unsupported`, a KV cache in another format; `export_damaged`, a scale that is not positive.
    """
    if export.kv_cache_algo is None:
        return
    if export.kv_cache_algo != "FP8":
        raise Failure("unsupported", f"a KV cache in {export.kv_cache_algo} does not run on the torch engine")
    stored = set(export.names)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "k_proj", None), nn.Module):
            module.k_scale = _scale(export, stored, f"{name}.k_proj.k_scale")
            module.v_scale = _scale(export, stored, f"{name}.v_proj.v_scale")
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _scale(export: Export, stored: set[str], name: str) -> float:
    scale = export.tensor(name).float().item() if name in stored else 1.0
    if not 0 < scale < float("inf"):
        raise Failure("export_damaged", f"{name}: is {scale}, not finite and positive")
    return scale


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
):
    key, value = rounded(key, module.k_scale), rounded(value, module.v_scale)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns x as an FP8 cache would give it back."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
