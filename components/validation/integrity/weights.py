"""Are the export's tensors the source's, but for what the format rounds away?

Layers are compared as they are stored: where a channel scale went into the norm or the layer before, or into a layer's
`pre_quant_scale`, the source is scaled alike. `likeness` says what is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.components.validation.integrity import likeness
from trimtab.components.validation.integrity.folds import Folds
from trimtab.components.validation.integrity.likeness import Likeness
from trimtab.components.validation.integrity.reading import Stream, ahead
from trimtab.families import Family
from trimtab.families.fusion import Group
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized
from trimtab.runtime.measure.measurements import Measurements


class _Pair(NamedTuple):
    """A layer as it is stored, or the tensor where it is not quantized, and its source's weight."""

    stored: Quantized | torch.Tensor
    source: torch.Tensor

    def to(self, device: torch.device) -> _Pair:
        return _Pair(*(part.to(device) for part in self))


def compare(
    export: Stream,
    source: Stream,
    family: Family,
    groups: Sequence[Group],
    settings: Quantization | None,
    folds: Folds,
    measured: Measurements | None = None,
) -> list[dict[str, Any]]:
    """Compares every tensor of an export with its source, on the GPU where there is one.

    Args:
        export: what was written; its layers and tensors are those that the recipe asks for.
        source: the plain checkpoint it was made from.
        family: of the model.
        groups: all linear layers of the model.
        settings: the recipe's `quantize`, None for a model that was only pruned or trained.
        folds: the channel scales that went into layers before.
        measured: what calibration measured of the inputs of the source's layers, None where it did not.

    Returns:
        For each quantized layer its name as `layer`, `cosine` and `relative_error` between source and stored
        weights, `output_error` of its outputs on calibration text (None without `measured`), and its bytes, as stored
        in `bytes` and in bfloat16 in `bf16_bytes`.

    Raises:
        Failure: `export_damaged`; names the layer, or the tensor that differs from its source.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, done = [], set()

    def read(group: Group) -> dict[str, _Pair]:
        change = _changes_norm(group, export, settings)
        pairs = {}
        for layer in group.layers:
            if layer in export.layers:
                pairs[layer] = _Pair(export.layer(layer), source.tensor(f"{layer}.weight"))
            elif change or folds.changes(layer):
                pairs[layer] = _Pair(*(each.tensor(f"{layer}.weight") for each in (export, source)))
        return pairs

    streamed = ahead(groups, read)
    for group, pairs in progress.track(streamed, "validate", "comparing layers with their source", len(groups)):
        change = None
        if _changes_norm(group, export, settings):
            change = _change(f"{group.norm}.weight", export, source, family.norm_offset)
            done.add(f"{group.norm}.weight")
            if source.has(f"{group.norm}.bias"):
                _check_scaled_bias(f"{group.norm}.bias", export, source, change)
                done.add(f"{group.norm}.bias")
            change = change.to(device)
        sketch, seen = f"{group.layers[0]}.sketch", None
        if measured and sketch in measured and any(isinstance(pair.stored, Quantized) for pair in pairs.values()):
            seen = measured[sketch].to(device)
        for layer, pair in pairs.items():
            pair, rows_by = pair.to(device), folds.rows(layer)
            if rows_by is not None:
                pair = pair._replace(source=pair.source * rows_by[:, None])
            if isinstance(pair.stored, Quantized):
                inputs = folds.inputs(layer) if change is None else change
                rows.append(_compare_layer(layer, pair, inputs, seen, group.norm))
            elif change is None:
                folds.check_plain(layer, *pair)
            else:
                # A bfloat16 has eight bits, and what rows were multiplied by is told by numbers that were rounded so.
                _check_scaled_back(layer, pair, change, group.norm, 2.0**-8 if rows_by is None else 2.0**-7)
            done.add(f"{layer}.weight")
    done |= folds.check_biases()
    plain = layer_layout.plain_dtype(settings.format) if settings else None
    left = [name for name in source.names if name not in done and export.has(name)]
    for name, pair in ahead(left, lambda name: _Pair(export.tensor(name), source.tensor(name))):
        original = pair.source
        dtype = layer_layout.dtype_beside(family, name, original.dtype, plain) if plain else original.dtype
        pair = pair.to(device)
        _check_same(name, pair.stored, pair.source.to(dtype))
    return rows


def _changes_norm(group: Group, export: Stream, settings: Quantization | None) -> bool:
    """Whether a channel scale was moved into the norm before a group."""
    layouts = [export.layers[layer] for layer in group.layers if layer in export.layers]
    return group.norm is not None and any(_scales_input(layout, settings) for layout in layouts)


def _scales_input(layout: Layout, settings: Quantization) -> bool:
    """Whether a channel scale was moved into the layer's input."""
    return any(settings.channels(part.name) for part in settings.row.parts if part.storage == layout.storage)


def _change(norm: str, export: Stream, source: Stream, offset: float) -> torch.Tensor:
    """Returns by what each channel was multiplied in a norm, float32 [in]; NaN where the norm makes it zero.

    Args:
        offset: what the norm adds to its weight before it multiplies.
    """
    after, before = export.tensor(norm).float() + offset, source.tensor(norm).float() + offset
    if after.shape != before.shape or not torch.isfinite(after).all():
        found = f"{list(after.shape)} where the source has {list(before.shape)}, or holds NaN or infinity"
        raise Failure("export_damaged", f"{norm}: has shape {found}")
    lost = (after == 0) & (before != 0)
    if lost.any():
        channel = int(lost.int().argmax())
        raise Failure("export_damaged", f"{norm}: multiplies channel {channel} by 0, its source does not")
    return torch.where(before == 0, torch.nan, after / before)


def _compare_layer(
    name: str, pair: _Pair, change: torch.Tensor | None, sketch: torch.Tensor | None, norm: str | None
) -> dict[str, Any]:
    layer, weight = pair
    if layer.shape != tuple(weight.shape):
        what = f"shape {list(layer.shape)} where the source has {list(weight.shape)}"
        raise Failure("export_damaged", f"{name}: {what}")
    if change is not None:  # channels that the norm makes zero, and whose scale it cannot show, are left out
        change = change.nan_to_num(0.0)
    if layer.pre_quant_scale is not None:
        own = layer.pre_quant_scale.float().reshape(-1)
        change = own if change is None else change * own
    found = likeness.measure(layer, weight, change, sketch)
    check_likeness(name, layer.layout, found, norm)
    return {
        "layer": name,
        "cosine": found.cosine,
        "relative_error": found.plain.error.item(),
        "output_error": found.outputs.error.item() if found.outputs else None,
        "bytes": layer.nbytes,
        "bf16_bytes": 2 * weight.numel(),
    }


def check_likeness(name: str, layout: Layout, found: Likeness, norm: str | None) -> None:
    """Compares what a layer has of its source with the limits of its format: it must meet each in one of the senses.

    Args:
        norm: the norm before the layer, which its input may be scaled by.

    Raises:
        Failure: `export_damaged`; names the layer, and the channel or block that is worst.
    """
    limits, senses, plain = layout.storage.limits, found.senses, found.plain
    scale = f"the scale in {norm}" if norm else "its pre_quant_scale"
    suspect = f"; look at {scale}" if layout.storage.pre_quant_scale else ""

    def check(what: str, measured: float, limit: float, allowed: str) -> None:
        if not measured <= limit:
            raise Failure("export_damaged", f"{name}: {what}, {layout.algo} allows {allowed}")

    def check_gain(what: str, distance: float, limit: float, departure: torch.Tensor, suspect: str = "") -> None:
        """Says of a gain what it is where all weights count alike."""
        gain = f"{what} has {1 + departure.item():.2f} times its source's weights"
        check(gain, distance, limit, f"{1 - limit:.2f} to {1 + limit:.2f}{suspect}")

    distance, worst = likeness.nearest([sense.rows for sense in senses])
    check_gain(f"output channel {worst}", distance, limits.channel_gain, plain.rows[worst])
    if layout.group_size:
        distance, worst = likeness.nearest([sense.blocks for sense in senses])
        row, block = divmod(worst, plain.blocks.shape[1])
        check_gain(f"group {block} of output channel {row}", distance, limits.block_gain, plain.blocks[row, block])
    distance, worst = likeness.nearest([sense.inputs for sense in senses])
    check_gain(f"input channel {worst}", distance, limits.input_gain, plain.inputs[worst], suspect)
    mean, _ = likeness.nearest([sense.input_distance for sense in senses])
    what = f"its input channels are {plain.input_distance.item():.1%} off their source's size in the mean"
    check(what, mean, limits.inputs, f"{limits.inputs:.1%}{suspect}")
    error, worst = likeness.nearest([sense.errors for sense in senses])
    what = f"output channel {worst} differs from its source by {error:.0%}"
    check(what, error, limits.channel_error, f"{limits.channel_error:.0%}")
    error, _ = likeness.nearest([sense.error for sense in senses])
    check(f"its weight differs from its source by {error:.0%}", error, limits.error, f"{limits.error:.0%}")


def _check_scaled_back(name: str, pair: _Pair, change: torch.Tensor, norm: str, step: float) -> None:
    """An excluded layer reads what its siblings read, so it makes up for what the norm was multiplied by."""
    found, expected = pair.stored, pair.source.float() / change
    expected = torch.where(expected.isnan(), found.float(), expected)
    if found.dtype != torch.bfloat16 or not torch.allclose(found.float(), expected, rtol=step, atol=0):
        what = f"is not its source's weight in bfloat16, divided by what {norm} was multiplied by"
        raise Failure("export_damaged", f"{name}: {what}")


def _check_scaled_bias(name: str, export: Stream, source: Stream, change: torch.Tensor) -> None:
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
