"""A quantized KV cache, emulated: keys and values are rounded to its format where attention reads them.

| recipe | `kv_cache_quant_algo` | stored numbers | `k_scale`, `v_scale` |
|---|---|---|---|
| fp8 | FP8 | e4m3 | amax / 448 |
| int8 | INT8 | -128 to 127 | amax / 127 |
| nvfp4 | NVFP4 | e2m1, and an e4m3 scale for each 16 along a head | amax / 448 |

Both scales are one float32 a layer, `<layer of the keys>.k_scale` and `<layer of the values>.v_scale`; ModelOpt
quantizes the keys after their rotary embedding. In NVFP4 the scale of a block, a sixth of its largest number, is
stored in units of the layer's: with ModelOpt 0.47's amax / 448 the blocks use e4m3 up to a sixth of its range
(unified_export_hf.py, `kv_cache_max_bound`). It never omits a calibrated scale;
its `*_cast` presets calibrate none, and TensorRT-LLM then takes an FP8 cache's for 1.0, and so does this.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from trimtab.base.errors import Failure
from trimtab.catalog.kv_caches import BY_ALGORITHM
from trimtab.families import Family
from trimtab.runtime.checkpoint import few_bits
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.kernels.replacements import grouped_attention

#: Which KV cache an export is run with: the one that it asks for, or 16 bits whatever it asks for.
ServedKVCache = Literal["export", "none"]
_NAME = "trimtab_kv_cache"


def apply(model: PreTrainedModel, export: Export) -> None:
    """Makes a model's attention read a rounded KV cache, if its export asks for one.

    Raises:
        Failure: `unsupported`, a KV cache in another format, or a model without the layers that it belongs to;
            `export_damaged`, a scale that is missing (FP8 has 1.0 then) or not one finite, positive number.
    """
    algorithm = export.kv_cache_algo
    if algorithm is None:
        return
    if algorithm not in BY_ALGORITHM:
        known = ", ".join(BY_ALGORITHM)
        raise Failure("unsupported", f"a KV cache in {algorithm} does not run on the torch engine; known: {known}")
    family = family_of(model)
    if why := family.attention.unscaled:
        raise Failure("unsupported", f"a KV cache in {algorithm}: a '{family.model_type}' {why}")
    for number, block in enumerate(model.get_submodule(family.blocks)):
        module = getattr(block, family.attention.module, None)
        if not hasattr(module, family.attention.key):  # a block of another process, or with a recurrent mixer
            continue
        name = f"{family.blocks}.{number}.{family.attention.module}"
        keys = getattr(module, family.attention.key).out_features
        head = getattr(module, "head_dim", 0) or keys // model.config.num_key_value_heads
        if (size := BY_ALGORITHM[algorithm].block) and head % size:
            what = f"{name} has heads of {head}, which blocks of {size} do not divide"
            raise Failure("unsupported", f"a KV cache in {algorithm}: {what}")
        module.kv_cache = (algorithm, *(_or_one(scale, algorithm) for scale in scales(export, family, name).items()))
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def scales(export: Export, family: Family, attention: str) -> dict[str, float | None]:
    """Returns the scales of an attention layer by the names of their tensors, keys first; None where missing.

    Raises:
        Failure: `export_damaged`, names a scale that is not one finite, positive number.
    """
    names = (f"{attention}.{family.attention.key}.k_scale", f"{attention}.{family.attention.value}.v_scale")
    return {name: _read(export, name) if export.has(name) else None for name in names}


def missing_scale(name: str, algorithm: str) -> Failure:
    """The failure of an export that lacks a scale which its KV cache needs."""
    return Failure("export_damaged", f"{name}: is missing, and a KV cache in {algorithm} has no scale without it")


def _read(export: Export, name: str) -> float:
    tensor = export.tensor(name).float()
    if tensor.numel() != 1:
        raise Failure("export_damaged", f"{name}: has shape {list(tensor.shape)}, expected one number")
    scale = tensor.item()
    if not 0 < scale < float("inf"):
        raise Failure("export_damaged", f"{name}: is {scale}, not finite and positive")
    return scale


def _or_one(named: tuple[str, float | None], algorithm: str) -> float:
    name, scale = named
    if scale is None and not BY_ALGORITHM[algorithm].scale_is_optional:
        raise missing_scale(name, algorithm)
    return 1.0 if scale is None else scale


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
):
    algorithm, k_scale, v_scale = module.kv_cache
    key, value = rounded(algorithm, key, k_scale), rounded(algorithm, value, v_scale)
    return grouped_attention(module, query, key, value, *args, **kwargs)


def rounded(algorithm: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns x [..., head_dim] as a cache in that format would give it back, in x's own type.

    Args:
        algorithm: ModelOpt's name of a format.
        scale: as in the table above; what exceeds the range that it gives is clipped.
    """
    return few_bits.round_to(BY_ALGORITHM[algorithm].numbers, x, scale).to(x.dtype)
