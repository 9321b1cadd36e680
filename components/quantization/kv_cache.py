"""The scales of a quantized KV cache, from the ranges that calibration measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trimtab.families import Family
from trimtab.runtime.formats import E4M3_MAX
from trimtab.runtime.scales import scale_of

#: What the largest key or value becomes. NVFP4's is ModelOpt's own, which current TensorRT-LLM reads: the blocks'
#: scales, a sixth of their largest value, then use e4m3 up to a sixth of its range.
_LARGEST = {"fp8": E4M3_MAX, "int8": 127.0, "nvfp4": E4M3_MAX}


def scales(
    form: str, family: Family, names: Sequence[str], measured: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns `k_scale` and `v_scale`, float32 scalars, of the attention layers whose weights are among the names.

    Args:
        form: the recipe's `kv_cache`.
        family: one with a layer of its own for keys, and for values.
        names: tensors of whole blocks.
        measured: name -> tensor of the calibration.
    """
    found = {}
    for (kind, part), layer in zip((("key", "k"), ("value", "v")), family.attention.scaled, strict=True):
        ranges = measured(f"{kind}_amax")
        for name in names:
            block, within = family.place(name)
            if within == f"{layer}.weight":
                found[f"{name.removesuffix('.weight')}.{part}_scale"] = scale_of(ranges[block], _LARGEST[form])
    return found
