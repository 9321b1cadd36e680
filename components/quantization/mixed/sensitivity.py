"""How much each format harms each group of layers: the rise of the output's KL divergence, without trying any.

A change of a layer's output by e moves the model's distribution by half of eᵀ F e, F being the Fisher information
of that output: the mean of g gᵀ over gradients g of the log-probability of tokens that the model itself draws, of
which the diagonal is taken. One pass forward and backward keeps g and the inputs x of some tokens. Rounding weights, W
to W', harms by the mean over these of half of Σ_i g_i² (W x' - W' x')_i². Rounding inputs, x to x', moves all outputs
of all layers that read them at once, so there the diagonal is taken of the information of the inputs, whose errors have
nothing to do with each other: half of Σ_j (Σ Wᵀ g)_j² (x - x')_j², the inner sum over these layers.

GPTQ makes up for a part of what rounding weights to nearest costs, which is rounded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab import families
from trimtab.base import progress
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.families import fusion
from trimtab.model.facts import inspect as read_facts
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import Quantized, dequantize
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure import gradients, measurements
from trimtab.runtime.measure.gradients import Sample
from trimtab.runtime.measure.measurements import Measurements
from trimtab.runtime.rounding import inputs

#: The part of nearest rounding's squared error of outputs that GPTQ leaves: of SmolLM2-135M's rise of log-perplexity,
#: AWQ with scales by Gram matrices before and GPTQ after, 0.57 in NVFP4 weights and 0.48 in INT4.
GPTQ_LEAVES = 0.5


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
    tokens = load_file(Path(calibration) / "tokens.safetensors")["tokens"].long()
    kept = gradients.samples(Path(checkpoint), gradients.enough(tokens), "sensitivity")
    measured = Measurements(Path(calibration), Path(checkpoint), "calibration")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    export, facts = Export(Path(checkpoint)), read_facts(Path(checkpoint))
    family, harms = families.named(facts.model_type), {}
    groups = fusion.groups([layer.name for layer in facts.linears], facts.model_type)
    groups = [group for group in groups if not all(map(family.keeps, group.layers))]
    for group in progress.track(groups, "sensitivity", "scoring every layer in every format", len(groups)):
        weights = {name: export.view(f"{name}.weight").to(device).float() for name in group.layers}
        seen = Input(*(measured[f"{group.layers[0]}.{p}"].to(device) for p in ("amax", "second_moment")))
        scales = family.scales_channels(group.layers[0])
        harms[group.layers[0]] = {
            form: _harm(form, weights, seen, kept, parameters["group_size"], scales) for form in parameters["formats"]
        }
    (Path(output) / "sensitivity.json").write_text(json.dumps(harms, indent=1), encoding="utf-8")
    measurements.bind(Path(output), Path(checkpoint))
    return {"groups": len(harms)}


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Reads what `measure` wrote: first layer of a group -> format -> harm."""
    return json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Simulated:
    """A layer as a format computes it, in the source's units: `scale` is what its channels were multiplied by, [in]."""

    stored: Quantized
    scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight, float32 [out, in]."""
        return dequantize(self.stored) / self.scale

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the layer reads, [..., in], as the format's product sees it, float32."""
        return inputs.rounded(self.stored.layout.storage.inputs, x / self.scale, self.stored.input_scale) * self.scale


def simulated(
    form: str,
    weights: Mapping[str, torch.Tensor],
    seen: Input,
    settings: Quantization,
    scales_channels: bool = True,
) -> dict[str, Simulated]:
    """Returns layers that share an input, float32 [out, in] each, in a format, weights rounded to nearest.

    Args:
        seen: of the input, without its Gram matrix.
        scales_channels: whether the input's channels may be scaled.
    """
    scale = packed_layers.channel_scale(form, weights, seen, settings) if scales_channels else None
    scale = torch.ones_like(seen.amax) if scale is None else scale
    scaled = {name: weight * scale for name, weight in weights.items()}
    made = packed_layers.quantize(form, scaled, seen.scaled(scale), settings)
    return {name: Simulated(stored, scale) for name, stored in made.items()}


@torch.inference_mode()
def _harm(
    form: str,
    weights: Mapping[str, torch.Tensor],
    seen: Input,
    kept: Mapping[str, Sample],
    group_size: int,
    scales_channels: bool,
) -> float:
    settings = Quantization(format=form, group_size=group_size)
    left = GPTQ_LEAVES if settings.rounding(form) == "gptq" else 1.0
    harm, of_inputs = 0.0, None
    for layer, made in simulated(form, weights, seen, settings, scales_channels).items():
        if layer not in kept:  # an expert that none of these tokens was given to
            continue
        read, gradient, share = kept[layer]
        x, gradient = read.to(seen.amax.device).float(), gradient.to(seen.amax.device).float()
        rounded = made.rounded(x)
        of_weights = rounded @ (weights[layer] - made.weight).t()
        harm += 0.5 * share * left * float((gradient.square() * of_weights.square()).sum())
        of_inputs = gradient @ weights[layer] + (0.0 if of_inputs is None else of_inputs)
    if of_inputs is not None:
        harm += 0.5 * share * float((of_inputs.square() * (x - rounded).square()).sum())
    return harm
