"""Coordinate descent after GPTQ: never a larger error, and in the end nothing that one weight alone could do better."""

from __future__ import annotations

import pytest
import torch

from trimtab.components.quantization.methods import descent, gptq, packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.rounding import hessian, scales
from trimtab.runtime.rounding.scales import INT4, MXFP4

#: Columns, rows, and the share of its mean that is added to the Gram matrix' diagonal.
COLUMNS, ROWS, DAMPING = 64, 12, 0.05


@pytest.fixture
def gram() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, COLUMNS, generator=draw) @ torch.randn(COLUMNS, COLUMNS, generator=draw)
    x *= torch.logspace(0, -1, COLUMNS)
    return x.t() @ x / 400


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def loss(found: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Each row's error with the damped matrix, [out]."""
    error = (found - weight).double()
    return (error @ hessian.damped(gram, DAMPING).double() * error).sum(1)


@pytest.mark.parametrize(
    ("kind", "groups"), [("int4", 4), ("mxfp4", 2), ("nvfp4", 4), ("int8", 1), ("e4m3", 1)]
)
def test_each_sweep_leaves_less(kind, groups, weight, gram):
    kinds = {"int4": INT4, "mxfp4": MXFP4, "int8": scales.INT8, "e4m3": scales.FP8}
    numbers = kinds.get(kind) or scales.nvfp4(weight.abs().max())
    scale = scales.from_maximum(weight.unflatten(1, (groups, -1)), numbers)
    scale = numbers.stored(scale)
    each = scale.repeat_interleave(COLUMNS // groups, 1)
    rounded = gptq.round_weights(weight, gram, each, numbers, DAMPING)
    losses = [loss(rounded, weight, gram)]
    for sweeps in (1, 2, 4):
        found, best = descent.descend(weight, rounded, gram, scale, numbers, DAMPING, sweeps)
        losses.append(loss(found, weight, gram))
        torch.testing.assert_close(best, numbers.stored(best), rtol=1e-6, atol=0)
        codes = found / best.repeat_interleave(COLUMNS // groups, 1)
        torch.testing.assert_close(codes, numbers.round(codes), rtol=1e-5, atol=1e-5)
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[1].sum() < losses[0].sum()


def test_in_the_end_no_weight_alone_can_do_better(weight, gram):
    scale = scales.from_maximum(weight.unflatten(1, (1, -1)), INT4)
    rounded = gptq.round_weights(weight, gram, scale.expand_as(weight), INT4, DAMPING)
    found, _ = descent.descend(weight, rounded, gram, scale, INT4, DAMPING, 50)
    least = loss(found, weight, gram)
    for column in range(COLUMNS):
        for code in range(-8, 8):
            other = found.clone()
            other[:, column] = code * scale[:, 0]
            assert (loss(other, weight, gram) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("form", ["int4_gptq", "fp8_gptq", "nvfp4", "nvfp4_wo", "mxfp4_wo"])
def test_layers_of_a_group_are_stored_with_the_scales_that_were_found(form, gram):
    """Dequantized, they err less than without a sweep."""
    draw = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(rows, COLUMNS, generator=draw) for name, rows in (("one", 8), ("other", 16))}
    seen = Input(torch.full((COLUMNS,), 3.0), gram.diagonal().clone(), gram)
    losses = []
    for sweeps in (0, 2):
        settings = Quantization(format=form, group_size=32, damping=DAMPING, sweeps=sweeps)
        made = packed_layers.quantize(form, weights, seen, settings)
        losses.append(sum(loss(dequantize(made[name]), weight, gram).sum() for name, weight in weights.items()))
    assert losses[1] < losses[0]
