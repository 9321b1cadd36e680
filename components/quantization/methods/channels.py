"""Channel scales: how much of the difficulty moves from the weights into the input, or back, before rounding.

A layer computes the same when input channel j is divided by s_j and column j of its weight multiplied by it. The
searches try s_j = a_j^alpha / w_j^beta over a grid, one s for all layers that share the input, and keep the one with
the least expected error of the output. None runs the model: what they need of the activations, the calibration pass
has measured.

Some channels must have one scale, because what makes them can be multiplied only together: `tied` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trimtab.runtime.rounding.folding import Tied, free
from trimtab.runtime.rounding.scales import INT8, from_maximum

ALPHAS = torch.linspace(0, 1, 21).tolist()
#: Exponents of the inputs and of the weights that smoothing tries.
SMOOTHING = [(alpha / 10, beta / 10) for beta in (0, 3, 6) for alpha in range(0, 11) if (alpha, beta) != (0, 0)]
#: Tokens that inputs are drawn for, to see how they are rounded; rows of a weight that stand for all of its rows.
DRAWN, ROWS = 128, 256

def awq(
    weights: Sequence[torch.Tensor],
    second_moment: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    tied: Tied = free,
) -> torch.Tensor:
    """Returns the channel scale for weight-only rounding, float32 [in] (Lin et al. 2023, "AWQ").

    Channels with large inputs get larger weights, so that rounding hurts them less. The error is that of the
    layers' outputs for inputs with the measured second moments and no correlation.

    Args:
        weights: those of the layers that share the input, or slices of their rows, floating point [out, in] each.
        second_moment: of the unscaled input, float32 [in].
        rounded: weight -> the weight that rounding leaves.
        tied: a channel scale -> one with the same value for all channels that must have one scale.
    """
    magnitude = _positive(second_moment).sqrt()
    candidates = [_normalized(tied(magnitude**alpha)) for alpha in ALPHAS[:-1]]
    errors = torch.zeros(len(candidates), device=second_moment.device)
    for weight in (part.float() for part in weights):
        for number, scale in enumerate(candidates):
            scaled, moment = weight * scale, second_moment / scale.square()
            errors[number] += rounded(scaled).sub_(scaled).square_().mul_(moment).sum()
    return candidates[int(errors.argmin())]


def smoothquant(
    weights: Sequence[torch.Tensor], amax: torch.Tensor, second_moment: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Returns the channel scale for INT8 weights and activations, float32 [in], and its alpha.

    Xiao et al. 2022, "SmoothQuant", has one alpha for the model. Here each input gets the one whose expected error
    is least: rounding to steps of d errs by d²/12 in the mean, so an input with one step d_x and rows of weights
    with steps d_i leave d_x²/12 Σ w² + Σ_i d_i²/12 Σ_j E[x_j²].

    Args:
        weights: those of the layers that share the input, or slices of their rows, floating point [out, in] each.
        amax: largest magnitude of the unscaled input, float32 [in].
        second_moment: of the unscaled input, float32 [in].
    """
    inputs = _positive(amax)
    columns = _positive(torch.stack([w.abs().amax(0) for w in weights]).amax(0).float())
    candidates = [(_normalized(inputs**alpha / columns ** (1 - alpha)), alpha) for alpha in ALPHAS]
    errors = []
    for scale, _ in candidates:
        step = (inputs / scale).max() / INT8.largest
        power = (second_moment / scale.square()).sum()
        parts = []
        for weight in weights:
            scaled = weight * scale
            parts.append(step.square() * scaled.square().sum() + from_maximum(scaled, INT8).square().sum() * power)
        errors.append(torch.stack(parts).sum())
    return candidates[int(torch.stack(errors).argmin())]


def smooth(
    weights: Sequence[torch.Tensor],
    second_moment: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    rounded_input: Callable[[torch.Tensor], torch.Tensor],
    tied: Tied = free,
) -> torch.Tensor:
    """Returns the channel scale for weights and activations that are both rounded in blocks, float32 [in].

    The error counts both roundings as they are: of the weights for inputs of the measured second moments and no
    correlation, and of inputs that are drawn with these moments from a normal distribution, at the rounded weights.

    Args:
        weights: those of the layers that share the input, floating point [out, in] each.
        second_moment: of the unscaled input, float32 [in].
        rounded: weight -> the weight that rounding leaves.
        rounded_input: inputs [n, in] -> what rounding leaves of them.
        tied: as for `awq`.
    """
    some = torch.cat([weight[:: -(-len(weight) // ROWS)].float() for weight in weights])
    inputs, columns = _positive(second_moment).sqrt(), _positive(some.square().mean(0)).sqrt()
    draw = torch.Generator().manual_seed(0)
    unit = torch.randn(DRAWN, len(second_moment), generator=draw).to(second_moment.device)
    candidates = [torch.ones_like(second_moment)]
    candidates += [_normalized(tied(inputs**alpha / columns**beta)) for alpha, beta in SMOOTHING]
    errors = []
    for scale in candidates:
        scaled, moment = some * scale, second_moment / scale.square()
        found = rounded(scaled)
        drawn = unit * moment.sqrt()
        noise = (rounded_input(drawn) - drawn).square_().mean(0)
        errors.append((found - scaled).square_().mul_(moment).sum() + found.square().mul_(noise).sum())
    return candidates[int(torch.stack(errors).argmin())]


def _positive(x: torch.Tensor) -> torch.Tensor:
    """Keeps channels that calibration never saw from getting a scale of zero; where it saw none, all are alike."""
    some = x.clamp_min(1e-5 * x.max()).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(x.max() == 0, 1.0, some)


def _normalized(scale: torch.Tensor) -> torch.Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
