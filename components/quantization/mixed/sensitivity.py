"""How much each format harms each group of layers: the rise of the output's KL divergence, without trying any.

A change of a layer's output by e moves the model's distribution by half of eᵀ F e, F being the Fisher information
of that output: the mean of g gᵀ over gradients g of the log-probability of tokens that the model itself draws. F
is taken as diagonal, and gradients and inputs as independent (Martens and Grosse 2015, "K-FAC"), so one pass
forward and backward, which measures E[g_i²], serves every format: with input moments E[x_j²] from calibration and
a rounding error D of the weights, the harm is half of Σ_ij E[g_i²] D_ij² E[x_j²], and what rounding the
activations adds to E[x_j²] counts in the same way for the weights themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.base import progress
from trimtab.catalog.formats import FORMATS
from trimtab.catalog.numbers import NUMBERS
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.checkpoint.layer_layout import Quantized, dequantize
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.measure import gradients, measurements, observe
from trimtab.runtime.measure.measurements import Measurements


def measure(
    checkpoint: str, calibration: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Writes `sensitivity.json`: for the first layer of each group, the harm of each format in nats a token.

    The tree is bound to the checkpoint as calibration's is.

    Args:
        parameters: `formats` to score, and the `group_size` of those that have one.

    Returns:
        groups.
    """
    model, _ = checkpoints.load_for_measuring(Path(checkpoint))
    tokens = load_file(Path(calibration) / "tokens.safetensors")["tokens"].long().to(model.device)
    energy = gradients.energy(model, gradients.enough(tokens), "sensitivity")
    measured = Measurements(Path(calibration), Path(checkpoint), "calibration")
    layers = observe.linears(model)
    harms = {}
    family = family_of(model)
    groups = [group for group in observe.linear_groups(model) if not all(map(family.keeps, group.layers))]
    for group in progress.track(groups, "sensitivity", "scoring every layer in every format", len(groups)):
        weights = {name: layers[name].weight.detach().float() for name in group.layers}
        seen = Input(*(measured[f"{group.layers[0]}.{p}"].to(model.device) for p in ("amax", "second_moment")))
        harms[group.layers[0]] = _harms(weights, seen, energy, parameters, family.scales_channels(group.layers[0]))
    (Path(output) / "sensitivity.json").write_text(json.dumps(harms, indent=1), encoding="utf-8")
    measurements.bind(Path(output), Path(checkpoint))
    return {"groups": len(harms)}


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Reads what `measure` wrote: first layer of a group -> format -> harm."""
    return json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))


def _activation_noise(stored: Quantized, seen: Input, scale: torch.Tensor) -> torch.Tensor | float:
    """The variance that rounding the activations adds to each channel of the unscaled input: d²/12 for a step d.

    A floating point step is in proportion to the number, and its square's mean over a binade is taken.
    """
    inputs = stored.layout.storage.inputs
    if inputs is None:
        return 0.0
    mantissa = NUMBERS[inputs.numbers].mantissa
    if mantissa is None:
        return (stored.input_scale * scale).square() / 12
    relative_step = 2.0**-mantissa
    return seen.second_moment * relative_step**2 / 12 / 2


def _stand_in(form: str) -> str:
    """Returns the format whose error is computed in the place of a format's.

    GPTQ's rounding is AWQ's with errors made up for, and what it leaves is not seen by second moments without
    correlation: what is stored alike and rounded to nearest, with the same scales of channels, stands in.
    """
    row = FORMATS[form]
    alike = (other for other in FORMATS.values() if (other.storage, other.channels) == (row.storage, row.channels))
    return next((other.name for other in alike if other.rounding == "nearest"), form)


@torch.inference_mode()
def _harms(
    weights: dict[str, torch.Tensor],
    seen: Input,
    energy: dict[str, torch.Tensor],
    parameters: dict[str, Any],
    scales_channels: bool,
) -> dict[str, float]:
    found: dict[str, float] = {}
    for scored in parameters["formats"]:
        form = _stand_in(scored)
        settings = Quantization(format=form, group_size=parameters["group_size"])
        scale = packed_layers.channel_scale(form, weights, seen, settings) if scales_channels else None
        scale = torch.ones_like(seen.amax) if scale is None else scale
        scaled = {name: weight * scale for name, weight in weights.items()}
        harm = 0.0
        for layer, stored in packed_layers.quantize(form, scaled, seen.scaled(scale), settings).items():
            weight = dequantize(stored) / scale
            squares = (weight - weights[layer]).square() * seen.second_moment
            squares += weight.square() * _activation_noise(stored, seen, scale)
            harm += 0.5 * float((energy[layer][:, None] * squares).sum())
        found[scored] = harm
    return found
