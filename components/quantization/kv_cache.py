"""The scales of a quantized KV cache, from the ranges that calibration measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.families import Family
from trimtab.runtime.scales import scale_of


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
                found[f"{name.removesuffix('.weight')}.{part}_scale"] = scale_of(ranges[block], KV_CACHES[form].largest)
    return found
