"""Shares the sparsity out over the layers: less where a layer's weights matter more to the model's output."""

from __future__ import annotations

from collections.abc import Mapping

import torch

#: How far a layer's share of zeros may be from the mean; near the ends, half of the way to one.
SPREAD = 0.2
#: The logarithms of scores are counted in bins, of which an octave has so many.
_OCTAVE = 16
_LOWEST, _HIGHEST = -149, 128  # what float32 holds


def scores(weight: torch.Tensor, second_moment: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Returns what each weight's absence harms the output, by the diagonal of the Fisher information.

    Args:
        weight: [out_features, in_features].
        second_moment: E[x²] of each input channel, float32 [in_features].
        energy: E[g²] of each output channel, float32 [out_features]; see `trimtab.runtime.measure.gradients`.

    Returns:
        w² E[x²] E[g²], float32 [out_features, in_features].

    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", with inputs and
    gradients taken as independent (Martens and Grosse 2015, "K-FAC").
    """
    return weight.float().square() * second_moment * energy[:, None]


def spectrum(scores: torch.Tensor) -> torch.Tensor:
    """Counts the scores by their logarithm, float64 [bins]; zeros stand in the first bin.

    It takes the place of the scores: those of all layers at once would be twice the model.
    """
    bins = (_HIGHEST - _LOWEST) * _OCTAVE
    places = ((scores.flatten().log2().clamp_min(_LOWEST) - _LOWEST) * _OCTAVE).long().clamp_max(bins - 1)
    return places.bincount(minlength=bins).double().cpu()


def shares(spectra: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """Returns the share of zeros of each layer: what one threshold for all scores would take, within `SPREAD`.

    Args:
        spectra: layer -> `spectrum` of its scores.
        sparsity: the mean over all weights, which the result has.
    """
    counts = torch.stack([*spectra.values()])
    sizes = counts.sum(1)
    # One more edge than bins; between two edges scores are taken to be spread evenly.
    below = torch.cat([torch.zeros(len(counts), 1, dtype=torch.float64), counts.cumsum(1)], 1) / sizes[:, None]
    spread = min(SPREAD, (1 - sparsity) / 2, sparsity / 2)
    bounded = below.clamp(sparsity - spread, sparsity + spread)
    mean = (bounded * sizes[:, None]).sum(0) / sizes.sum()
    right = int(torch.searchsorted(mean, sparsity).clamp(1, len(mean) - 1))
    step = mean[right] - mean[right - 1]
    part = (sparsity - mean[right - 1]) / step if step > 0 else 0.0
    found = bounded[:, right - 1] + part * (bounded[:, right] - bounded[:, right - 1])
    return dict(zip(spectra, found.tolist(), strict=True))
