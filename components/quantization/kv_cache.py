"""The scales of a quantized KV cache, from the ranges that calibration measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.fusion import block_of
from trimtab.runtime.scales import scale_of


def scales(
    form: str, names: Sequence[str], measured: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns `k_scale` and `v_scale`, float32 scalars, of the attention layers whose weights are among the names.

    Args:
        form: the recipe's `kv_cache`.
        names: tensors of whole blocks.
        measured: name -> tensor of the calibration.
    """
    found = {}
    for kind, part in (("key", "k"), ("value", "v")):
        ranges = measured(f"{kind}_amax")
        for name in names:
            if name.endswith(f".{part}_proj.weight"):
                layer = name.removesuffix(".weight")
                found[f"{layer}.{part}_scale"] = scale_of(ranges[block_of(name)], KV_CACHES[form].largest)
    return found
