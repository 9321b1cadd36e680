"""Are the export's tensors the source's, but for what the format rounds away?

Layers are compared as they are stored: where a channel scale went into the norm before a layer, or into its
`pre_quant_scale`, the source is scaled alike. Beside the error there is the gain, the source's part in what is
stored: <stored, source> / <source, source>. Rounding errors leave it at 1, whatever their size, and a wrong scale
moves it by as much as the scale is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.families import Family
from trimtab.families.fusion import Group
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout
from trimtab.runtime.checkpoint.model_files import Export

#: Of the root mean square of all channels or blocks: smaller ones are too small to judge by their own size.
_LEAST_CHANNEL, _LEAST_INPUT = 0.01, 0.5
#: Numbers of float32 whose product is still in a processor's cache when it is summed: 2 MiB.
_CACHED = 2**19


def compare(
    export: Export, source: Export, family: Family, groups: Sequence[Group], settings: Quantization | None
) -> list[dict[str, Any]]:
    """Compares every tensor of an export with its source.

    Args:
        export: what was written; its layers and tensors are those that the recipe asks for.
        source: the plain checkpoint it was made from.
        family: of the model.
        groups: all linear layers of the model.
        settings: the recipe's `quantize`, None for a model that was only pruned or trained.

    Returns:
        For each quantized layer its name as `layer`, `cosine` and `relative_error` between source and stored
        weights, and its bytes, as stored in `bytes` and in bfloat16 in `bf16_bytes`.

    Raises:
        Failure: `export_damaged`; names the layer, or the tensor that differs from its source.
    """
    rows, done = [], set()
    for group in progress.track(groups, "validate", "comparing layers with their source", len(groups)):
        layouts = [export.layers[layer] for layer in group.layers if layer in export.layers]
        change = None
        if group.norm and any(_scales_input(layout, settings) for layout in layouts):
            change = _change(f"{group.norm}.weight", export, source, family.norm_offset)
            done.add(f"{group.norm}.weight")
            if source.has(f"{group.norm}.bias"):
                _check_scaled_bias(f"{group.norm}.bias", export, source, change)
                done.add(f"{group.norm}.bias")
        for layer in group.layers:
            if layer in export.layers:
                rows.append(_compare_layer(layer, export, source, change, group.norm))
            elif change is not None:
                _check_scaled_back(layer, export, source, change, group.norm)
            else:
                continue
            done.add(f"{layer}.weight")
    plain = layer_layout.plain_dtype(settings.format) if settings else None
    for name in source.names:
        if name not in done and export.has(name):
            original = source.tensor(name)
            dtype = layer_layout.dtype_beside(family, name, original.dtype, plain) if plain else original.dtype
            _check_same(name, export.tensor(name), original.to(dtype))
    return rows


def _scales_input(layout: Layout, settings: Quantization) -> bool:
    """Whether a channel scale was moved into the layer's input."""
    return any(part.channels for part in settings.row.parts if part.storage == layout.storage)


def _change(norm: str, export: Export, source: Export, offset: float) -> torch.Tensor:
    """Returns by what each channel was multiplied in a norm, float32 [in]; NaN where the norm makes it zero.

    Args:
        offset: what the norm adds to its weight before it multiplies.
    """
    after, before = export.tensor(norm).float() + offset, source.tensor(norm).float() + offset
    if after.shape != before.shape or not torch.isfinite(after).all():
        found = f"{list(after.shape)} where the source has {list(before.shape)}, or holds NaN or infinity"
        raise Failure("export_damaged", f"{norm}: has shape {found}")
    return torch.where(before == 0, torch.nan, after / before)


def _compare_layer(
    name: str, export: Export, source: Export, change: torch.Tensor | None, norm: str | None
) -> dict[str, Any]:
    layer = export.layer(name)
    stored, weight = layer_layout.scaled_weight(layer), source.tensor(f"{name}.weight").float()
    if stored.shape != weight.shape:
        what = f"shape {list(stored.shape)} where the source has {list(weight.shape)}"
        raise Failure("export_damaged", f"{name}: {what}")
    for scale in (change, layer.pre_quant_scale):
        if scale is not None:
            weight /= scale.float().reshape(-1)
    dead = weight.isnan()  # channels that the norm makes zero, and whose scale it cannot show
    stored[dead], weight[dead] = 0, 0
    dot, own = _sums(stored, weight, "o"), _sums(weight, weight, "o")
    _check_gains(name, layer.layout, stored, weight, norm)
    cosine = dot.sum() / (stored.norm() * weight.norm()).clamp_min(1e-30)
    squares = stored.sub_(weight).square_().sum(1)
    error = (squares.sum() / own.sum().clamp_min(1e-30)).sqrt().item()
    errors = (squares / own.clamp_min(_LEAST_CHANNEL**2 * own.mean()).clamp_min(1e-30)).sqrt()
    limits, worst = layer.layout.storage.limits, int(errors.argmax())
    for what, found, limit in (
        (f"output channel {worst}", errors[worst].item(), limits.channel_error),
        ("its weight", error, limits.error),
    ):
        if not found <= limit:
            allowed = f"{layer.layout.algo} allows {limit:.0%}"
            raise Failure("export_damaged", f"{name}: {what} differs from its source by {found:.0%}, {allowed}")
    return {
        "layer": name,
        "cosine": cosine.item(),
        "relative_error": error,
        "bytes": layer.nbytes,
        "bf16_bytes": 2 * weight.numel(),
    }


def _check_gains(name: str, layout: Layout, stored: torch.Tensor, weight: torch.Tensor, norm: str | None) -> None:
    limits, algo = layout.storage.limits, layout.algo
    scale = f"the scale in {norm}" if norm else "its pre_quant_scale"
    gain, _ = _gains(stored, weight, "o", _LEAST_CHANNEL)
    _check_gain(f"{name}: output channel {_worst(gain)}", gain, limits.channel_gain, algo)
    if layout.group_size:
        blocks = (-1, layout.group_size)
        gain, _ = _gains(stored.unflatten(1, blocks), weight.unflatten(1, blocks), "og", _LEAST_CHANNEL)
        row, block = divmod(_worst(gain), gain.shape[1])
        _check_gain(f"{name}: group {block} of output channel {row}", gain, limits.block_gain, algo)
    gain, size = _gains(stored, weight, "i", _LEAST_INPUT)
    suspect = f"; look at {scale}" if layout.storage.pre_quant_scale else ""
    _check_gain(f"{name}: input channel {_worst(gain)}", gain, limits.input_gain, algo, suspect)
    mean = ((gain - 1).square().mul(size).sum() / size.sum().clamp_min(1e-30)).sqrt().item()
    if not mean <= limits.inputs:
        what = f"its input channels are {mean:.1%} off their source's size in the mean"
        raise Failure("export_damaged", f"{name}: {what}, {algo} allows {limits.inputs:.1%}{suspect}")


def _gains(stored: torch.Tensor, weight: torch.Tensor, kept: str, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gains along the axes of `kept`, 1 where too little stands to be judged, and the squares there."""
    dot, own = _sums(stored, weight, kept), _sums(weight, weight, kept)
    return torch.where(own > least**2 * own.mean(), dot / own, 1.0), own


def _sums(a: torch.Tensor, b: torch.Tensor, kept: str) -> torch.Tensor:
    # Not by einsum: along short groups it becomes a batch of millions of tiny matrix products, a minute a layer at 8B.
    return (a * b).sum(0 if kept == "i" else -1)


def _worst(gain: torch.Tensor) -> int:
    return int((gain - 1).abs().nan_to_num(torch.inf).argmax())


def _check_gain(what: str, gain: torch.Tensor, limit: float, algo: str, suspect: str = "") -> None:
    worst = gain.flatten()[_worst(gain)].item()
    if not abs(worst - 1) <= limit:
        allowed = f"{algo} allows {1 - limit:.2f} to {1 + limit:.2f}"
        raise Failure("export_damaged", f"{what} has {worst:.2f} times its source's weights, {allowed}{suspect}")


def _check_scaled_back(name: str, export: Export, source: Export, change: torch.Tensor, norm: str) -> None:
    """An excluded layer reads what its siblings read, so it makes up for what the norm was multiplied by."""
    found, weight = export.tensor(f"{name}.weight"), source.tensor(f"{name}.weight").float()
    expected = weight / change
    expected = torch.where(expected.isnan(), found.float(), expected)
    step = 2.0**-8  # a bfloat16 has eight bits
    if found.dtype != torch.bfloat16 or not torch.allclose(found.float(), expected, rtol=step, atol=0):
        what = f"is not its source's weight in bfloat16, divided by what {norm} was multiplied by"
        raise Failure("export_damaged", f"{name}: {what}")


def _check_scaled_bias(name: str, export: Export, source: Export, change: torch.Tensor) -> None:
    """The bias of a norm is multiplied by what its weight was multiplied by."""
    found, expected = export.tensor(name).float(), source.tensor(name).float() * change.nan_to_num(1.0)
    if not torch.allclose(found[~change.isnan()], expected[~change.isnan()], rtol=2.0**-7, atol=0):
        raise Failure("export_damaged", f"{name}: is not its source's, multiplied as the weight of its norm was")


def _check_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        both = f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
        raise Failure("export_damaged", f"{name}: is {both}")
    if found.is_floating_point() and not torch.isfinite(found).all():
        raise Failure("export_damaged", f"{name}: holds NaN, infinity or what {found.dtype} cannot hold")
    if not torch.equal(found, expected):
        count = int((found != expected).sum())
        raise Failure("export_damaged", f"{name}: differs from its source in {count} of {found.numel()} numbers")
