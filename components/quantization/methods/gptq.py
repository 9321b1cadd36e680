"""GPTQ: rounds a matrix column by column and lets the columns still open make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". As in the
authors' later code, the columns with the largest second moment go first, and the scales of all groups are fixed
beforehand, so that the order leaves the layout alone.
"""

from __future__ import annotations

import torch

from trimtab.components.quantization.methods import columns
from trimtab.recipe import MANY_TOKENS, Quantization
from trimtab.runtime.rounding import hessian
from trimtab.runtime.rounding.scales import Numbers

#: What is added to the diagonal, as a share of its mean, where there are few tokens. The paper has 1 %, for some
#: 260,000 tokens; with the few thousand of trimtab's own text more of what they correlate is chance. SmolLM2-135M's
#: perplexity ratio, calibrated on them and measured on WikiText-2: 1.179 with 0.01, 1.153 with 0.1, 1.118 with 0.3,
#: 1.128 with 1. Calibrated on 32 windows of WikiText-2 itself the choice matters less: 1.063, 1.065 and 1.060.
DAMPING = 0.3
#: Up to `MANY_TOKENS` that holds. With more, damping goes as one over their number, as chance does in the square of
#: what they correlate, down to what is best published with half a million (llm-compressor 2922: 0.05).
LEAST_DAMPING = 0.05
#: Columns whose errors are passed on within before the rest is updated at once.
BLOCK = 64


def with_defaults(settings: Quantization, tokens: int) -> Quantization:
    """Returns the settings with the damping and sweeps that they name, or else those for that many calibration tokens.
    """
    damping = max(LEAST_DAMPING, DAMPING * min(1.0, MANY_TOKENS / tokens))
    damping = damping if settings.damping is None else settings.damping
    return settings.model_copy(update={"damping": damping, "sweeps": settings.sweeps_with(tokens)})


def round_weights(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, numbers: Numbers, damping: float = DAMPING
) -> torch.Tensor:
    """Returns the weight rounded to whole multiples of its scales, float32 [out, in].

    Rows do not depend on each other, so those of several matrices with one input may come together.

    Args:
        weight: float32 [out, in].
        gram: mean of x xᵀ over the inputs, float32 [in, in].
        scale: each weight's scale, float32 [out, in].
        numbers: the multiples that there are.
        damping: what is added to the Gram matrix' diagonal, as a share of its mean.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    upper = hessian.inverse_factor(gram[order][:, order], damping)
    # Columns as rows, for all that follows goes through them one by one: its cost is that of so many small kernels.
    weight, scale = (tensor[:, order].t().contiguous() for tensor in (weight, scale))
    rounded = torch.empty_like(weight)
    for begin in range(0, len(weight), BLOCK):
        end = min(begin + BLOCK, len(weight))
        diagonal = upper.diagonal()[begin:end, None]
        passed_on = upper[begin:end, begin:end] / diagonal
        rounded[begin:end], moved = columns.in_turn(weight[begin:end], scale[begin:end], passed_on, numbers)
        weight[end:].addmm_(upper[begin:end, end:].t(), moved / diagonal)
    return rounded.t()[:, order.argsort()]

