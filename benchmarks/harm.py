"""Do harms add up to what a mix of formats really loses? The sums of `sensitivity`, beside true KL divergences.

Run: python benchmarks/harm.py --model FOLDER [--text FILE] [--samples 8] [--windows 4] [--bits 5 5.5 6] [--quick]

Layers of one kind in one format, then what `mixed_gpu` chooses within each budget, both with all else as it is. Weights
are rounded to nearest, those of formats with GPTQ half as far as that in the square, which is what `sensitivity` counts
too; inputs are rounded as the format has it. The calibration windows measure, as many of them as --windows says; a
divergence is that of the dense model's next token, the mean over all tokens, in nats. The last line is a JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import Measuring, add_arguments
from safetensors.torch import load_file

from trimtab.components.calibration.work import calibrate
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.components.quantization.mixed import assignment, sensitivity
from trimtab.families import fusion
from trimtab.model.facts import inspect
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.measure import observe
from trimtab.runtime.measure.measurements import Measurements

MIX = "mixed_gpu"


class Losses:
    """What a model loses where some of its layers are in other formats.

    Args:
        source: its folder.
        measured: what calibration measured.
        tokens: int64 [windows, length].
    """

    def __init__(self, source: Path, measured: Measurements, tokens: torch.Tensor):
        facts = inspect(source)
        self.model, _ = model_files.load_for_measuring(source)
        self._layers, self._measured = observe.linears(self.model), measured
        self.groups = fusion.groups(list(self._layers), facts.model_type)
        self._plain = {name: layer.weight.data for name, layer in self._layers.items()}
        self._tokens, self._made = tokens.to(self.model.device), {}
        self._dense = self._predicted()

    @torch.inference_mode()
    def of(self, chosen: Mapping[str, str]) -> float:
        """Returns the KL divergence with these layers in these formats, in nats a token."""
        handles = []
        try:
            for name, form in chosen.items():
                weight, round_inputs = self._in_format(name, form)
                self._layers[name].weight.data = weight
                handles.append(self._layers[name].register_forward_pre_hook(round_inputs))
            changed = self._predicted()
        finally:
            for handle in handles:
                handle.remove()
            for name in chosen:
                self._layers[name].weight.data = self._plain[name]
        pairs = zip(self._dense, changed, strict=True)
        return torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in pairs]).mean().item()

    @torch.inference_mode()
    def _predicted(self) -> list[torch.Tensor]:
        """The log-probabilities of the next token, of each window."""
        return [self.model(window[None]).logits[0].float().log_softmax(-1) for window in self._tokens]

    def _in_format(self, name: str, form: str) -> tuple[torch.Tensor, Any]:
        """A layer's weight in a format, and what rounds its inputs before it is called."""
        if (name, form) not in self._made:
            group = next(group for group in self.groups if name in group.layers)
            self._made |= {(layer, form): each for layer, each in self._group_in_format(group.layers, form).items()}
        return self._made[name, form]

    def _group_in_format(self, layers: tuple[str, ...], form: str) -> dict[str, tuple[torch.Tensor, Any]]:
        settings, device = Quantization(format=form), self.model.device
        weights = {layer: self._plain[layer].float() for layer in layers}
        seen = Input(*(self._measured[f"{layers[0]}.{part}"].to(device) for part in ("amax", "second_moment")))
        part = (sensitivity.GPTQ_LEAVES if settings.rounding(form) == "gptq" else 1.0) ** 0.5
        found = {}
        for layer, made in sensitivity.simulated(form, weights, seen, settings).items():

            def round_inputs(_: torch.nn.Module, args: tuple[Any, ...], made: Any = made) -> tuple[Any, ...]:
                return made.rounded(args[0]).to(args[0].dtype), *args[1:]

            weight = weights[layer] + part * (made.weight - weights[layer])
            found[layer] = weight.to(self._plain[layer].dtype), round_inputs
        return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures, prints a row each, and returns the figures."""
    calibration, harms = folder / "calibration", folder / "sensitivity"
    for each in (calibration, harms):
        each.mkdir()
    calibrate(str(options.model), str(calibration), "", Measuring(options, folder).calibration(options.first_seed))
    forms = Quantization(format=MIX, effective_bits=4).layer_formats
    parameters = {"formats": list(forms), "group_size": 64}
    sensitivity.measure(str(options.model), str(calibration), str(harms), "", parameters)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()[: options.windows]
    measured = Measurements(calibration, options.model, "calibration")
    losses, told = Losses(options.model, measured, tokens), sensitivity.read(harms)
    first = {layer: group.layers[0] for group in losses.groups for layer in group.layers}
    figures: dict[str, Any] = {}

    def tell(title: str, chosen: Mapping[str, str]) -> None:
        predicted = sum(told[layer][form] for layer, form in chosen.items() if first[layer] == layer)
        figures[title] = {"predicted": predicted, "true": losses.of(chosen)}
        print(f"{title:<40}{predicted:>12.5f}{figures[title]['true']:>10.5f}", flush=True)

    print(f"{'layers':<40}{'predicted':>12}{'true':>10}")
    kinds = sorted({layer.rpartition(".")[2] for layer in told})
    for form in forms:
        for kind in kinds:
            tell(f"{kind} and its like, {form}", {n: form for n, head in first.items() if head.endswith(f".{kind}")})
        tell(f"all, {form}", dict.fromkeys(first, form))
    facts = inspect(options.model)
    for bits in options.bits:
        settings = Quantization(format=MIX, effective_bits=bits)
        tell(f"{MIX}, {bits:g} bits", assignment.choose(losses.groups, facts, settings, harms))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(samples=8, windows=4)
    parser.add_argument("--bits", type=float, nargs="*", default=[5.0, 5.5, 6.0, 6.5])
    parser.add_argument("--quick", action="store_true", help="little text, one budget")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.windows, options.bits = 2, 1, [6.0]
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(run(options, Path(name))))
    sys.exit(0)
