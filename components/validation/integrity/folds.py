"""Channel scales that went into the layer before: that layer's rows show them.

By what a row there was multiplied is its gain, the source's part in what is stored, which rounding leaves near its
value; the input channels that the row makes are multiplied by as much. So the two layers are compared with each other:
a scale that went into one of them alone shows in the layer behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.components.validation.integrity.reading import Stream
from trimtab.families.fusion import Group
from trimtab.model.facts import ModelFacts
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.rounding import folding

#: How far a bias may be from its source's times the gain of its row, which rounding blurs.
_BIAS = 0.2


class Folds:
    """The scales of an export that no tensor of their own holds, nor a norm.

    Args:
        export, source: what was written, and what it was made from.
        groups: all linear layers of the model.
        settings: the recipe's `quantize`, or None.
        facts: of the source.
    """

    def __init__(
        self, export: Stream, source: Stream, groups: Sequence[Group], settings: Quantization | None, facts: ModelFacts
    ):
        self._export, self._source, self._facts = export, source, facts
        self._makers: dict[str, str] = {}
        if settings:
            stored = {part.storage.algorithm: part.name for part in settings.row.parts}
            chosen = {layer: stored[layout.algo] for layer, layout in export.layers.items() if layout.algo in stored}
            self._makers = folding.makers(groups, chosen, settings, facts)
        self._before = {*self._makers.values()}
        self._norms = {layer: group.norm for group in groups for layer in group.layers if group.norm}
        self._offset = families.named(facts.model_type).norm_offset
        self._sizes = {layer.name: layer.in_features for layer in facts.linears}
        self._gains: dict[str, torch.Tensor] = {}

    def changes(self, layer: str) -> bool:
        """Whether a layer's rows were divided, or its columns multiplied."""
        return layer in self._before or layer in self._makers

    def rows(self, layer: str) -> torch.Tensor | None:
        """Returns by what each row of a layer was multiplied, float32 [out]; 1 where its source is zero, or None."""
        return self._gain(layer).nan_to_num(1.0) if layer in self._before else None

    def inputs(self, layer: str) -> torch.Tensor | None:
        """Returns by what each channel of a layer's input is multiplied, float32 [in], NaN where nothing tells it;
        None where the input is the source's."""
        if layer not in self._makers:
            return None
        return folding.widened(self._gain(self._makers[layer]), self._sizes[layer], self._facts.head_dim)

    def check_plain(self, layer: str, found: torch.Tensor, source: torch.Tensor) -> None:
        """Compares a layer that is not quantized with its source, multiplied by the gains of its rows.

        Raises:
            Failure: `export_damaged`; it differs by more than its type rounds away.
        """
        if found.dtype != torch.bfloat16 or not torch.allclose(found.float(), source.float(), rtol=2.0**-7, atol=0):
            raise Failure("export_damaged", f"{layer}: is not its source's weight in bfloat16, a factor for each row")

    def check_biases(self) -> set[str]:
        """Compares the biases of layers whose rows were divided with their source's, and returns their names.

        Raises:
            Failure: `export_damaged`; one is not divided as its row.
        """
        found = {f"{layer}.bias": layer for layer in self._before if self._source.has(f"{layer}.bias")}
        for name, layer in found.items():
            stored = self._export.tensor(name).float()
            expected = self._source.tensor(name).float() * self.rows(layer).cpu()
            if not torch.allclose(stored, expected, rtol=_BIAS, atol=0):
                what = "is not its source's, multiplied as the rows of its weight were"
                raise Failure("export_damaged", f"{name}: {what}")
        return found.keys()

    def _gain(self, layer: str) -> torch.Tensor:
        if layer not in self._gains:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            weight = self._source.tensor(f"{layer}.weight").to(device).float()
            if layer in self._norms:  # what its columns were divided by, and the norm multiplies by
                both = (each.tensor(f"{self._norms[layer]}.weight").float() for each in (self._source, self._export))
                before, after = (tensor.to(device) + self._offset for tensor in both)
                weight = weight * torch.where((before == 0) | (after == 0), 0.0, before / after)
            if layer in self._export.layers:
                stored = layer_layout.scaled_weight(self._export.layer(layer).to(device))
            else:
                stored = self._export.tensor(f"{layer}.weight").to(device).float()
            self._gains[layer] = (stored * weight).sum(1) / weight.square().sum(1)
        return self._gains[layer]
