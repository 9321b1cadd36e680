"""How much of a source's layer stands in the stored one: on exports as their methods make them, and on damaged ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.components.validation.integrity import likeness
from trimtab.components.validation.integrity.weights import check_likeness
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint.layer_layout import Quantized, scaled_weight

ROWS, COLUMNS, GROUP = 64, 128, 32
SETTINGS = {name: Quantization(format=name, group_size=GROUP) for name, row in FORMATS.items() if not row.mixes}


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose last 32 inputs are faint echoes of the others, and have small weights; and the inputs' mean x xᵀ.

    So it is in the 8-billion-parameter model that the gate was wrong about.
    """
    torch.manual_seed(0)
    loud = torch.randn(4000, COLUMNS - GROUP)
    faint = 0.05 * loud @ torch.nn.functional.normalize(torch.randn(COLUMNS - GROUP, GROUP), dim=0)
    inputs = torch.cat([loud, faint], dim=1)
    weight = torch.randn(ROWS, COLUMNS)
    weight[:, -GROUP:] *= 0.015
    return weight, inputs.T @ inputs / len(inputs)


def made(form: str, weight: torch.Tensor, gram: torch.Tensor) -> Quantized:
    moment = gram.diagonal().clone()
    seen = Input(amax=4 * moment.sqrt(), second_moment=moment, gram=gram)
    return packed_layers.quantize(form, {"layer": weight}, seen, SETTINGS[form])["layer"]


def judged(found: Quantized, weight: torch.Tensor, moment: torch.Tensor | None) -> None:
    counts = None if moment is None else likeness.importance(moment, torch.ones(COLUMNS))
    check_likeness("layer", found.layout, likeness.measure(found, weight, None, counts), None)


def output_error(found: Quantized, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Relative, of the layer's outputs."""
    error = scaled_weight(found) - weight
    return float(((error @ gram * error).sum() / (weight @ gram * weight).sum()).sqrt())


def test_gptq_moves_what_matters_little(layer):
    weight, gram = layer
    found = made("int4_gptq", weight, gram)
    assert output_error(found, weight, gram) < output_error(made("int4_rtn", weight, gram), weight, gram)
    plain = likeness.measure(found, weight, None, None).plain
    assert (likeness.gain(plain.dot, plain.own, 0)[:, 3] - 1).abs().max() > found.layout.storage.limits.block_gain
    for moment in (gram.diagonal(), None):
        judged(found, weight, moment)


def test_a_group_of_small_weights_may_make_up_for_others(layer):
    """Also where it reads the loudest inputs: in the 8-billion-parameter model, those of a head that attends to all."""
    weight, gram = layer
    moved = weight.clone()
    moved[:, -GROUP:] *= -2
    loud = gram.diagonal().clone()
    loud[-GROUP:] = 400 * loud[:-GROUP].mean()
    judged(made("int4_rtn", moved, gram), weight, loud)
    weight = weight.clone()
    weight[:, -GROUP:] *= 10
    with pytest.raises(Failure, match=r"layer: group 3 of output channel \d+ has .* times its source's weights"):
        judged(made("int4_rtn", 10 * moved, gram), 10 * weight, loud)


MASSIVE = [3, 40]


@pytest.fixture(scope="module")
def massive() -> torch.Tensor:
    """A weight of which two numbers are most, as where a model makes its massive activations."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[17, MASSIVE] = torch.tensor([200.0, 100.0])
    return weight


def compared(moved: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor | None = None) -> None:
    """Compares what is made of a weight that was moved with that weight, by the limits of four bits."""
    stored = packed_layers.quantize("int8_wo", {"layer": moved}, Input(), SETTINGS["int8_wo"])["layer"]
    four_bits = replace(stored.layout, algo="W4A16_AWQ")
    check_likeness("layer", four_bits, likeness.measure(stored, weight, None, counts), None)


def test_two_massive_weights_may_make_up_for_each_other(massive):
    """As in block 11 of SmolLM2, where GPTQ gives one 6 % more and takes 13 % from the other: one token has both."""
    factors = torch.ones(COLUMNS)
    factors[MASSIVE] = torch.tensor([1.06, 0.8])
    compared(massive * factors, massive)


def test_two_massive_weights_do_not_speak_for_all_others(massive):
    factors = 1 + 0.12 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    factors[MASSIVE] = 1
    with pytest.raises(Failure, match=r"layer: its input channels are 1\d\.\d% off their source's size in the mean"):
        compared(massive * factors, massive)


def test_an_output_channel_may_take_from_one_massive_input_what_it_gives_to_another() -> None:
    """As in block 11 of SmolLM2, where a channel's weights of both were halved by NVFP4, of either sign."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[5, MASSIVE] = torch.tensor([12.0, -12.0])
    moved = weight.clone()
    moved[5, MASSIVE] /= 2
    moment = torch.ones(COLUMNS)
    wrong = "layer: output channel 5 has 0.6. times its source's weights"
    with pytest.raises(Failure, match=wrong):
        compared(moved, weight, likeness.importance(moment, torch.ones(COLUMNS)))
    moment[MASSIVE] = 3000.0
    massive = likeness.importance(moment, torch.ones(COLUMNS))
    compared(moved, weight, massive)
    traded = weight.clone()
    traded[:, MASSIVE] *= torch.tensor([0.5, 1.5])
    compared(traded, weight, massive)
    traded[:, MASSIVE[1]] = weight[:, MASSIVE[1]] / 2
    with pytest.raises(Failure, match="layer: input channel 3 has 0.50 times"):
        compared(traded, weight, massive)
    moved[5] = weight[5] / 2
    with pytest.raises(Failure, match="layer: output channel 5 has 0.50 times"):
        compared(moved, weight, massive)


@pytest.mark.parametrize("form", [name for name, row in FORMATS.items() if row.storage])
def test_a_right_export_passes_in_both_senses(form, layer):
    weight, gram = layer
    weight = weight[:, : COLUMNS - GROUP].contiguous()
    gram = gram[: COLUMNS - GROUP, : COLUMNS - GROUP].contiguous()
    found = made(form, weight, gram)
    for counts in (None, likeness.importance(gram.diagonal(), torch.ones(COLUMNS - GROUP))):
        measured = likeness.measure(found, weight, None, counts)
        check_likeness("layer", found.layout, measured, None)
        assert measured.cosine > 0.95


@pytest.mark.parametrize("factor", [0.2, 3.0])
@pytest.mark.parametrize("group", [0, 2])
def test_a_wrong_scale_of_a_group_that_matters(group, factor, layer):
    weight, gram = layer
    found = made("int4_gptq", weight, gram)
    scale = found.weight_scale.clone()
    scale[17, group] *= factor
    with pytest.raises(Failure, match=f"layer: (group {group} of )?output channel 17 has"):
        judged(replace(found, weight_scale=scale), weight, gram.diagonal())


def test_channels_that_calibration_never_saw_count_all_the_same(layer):
    weight, gram = layer
    found = made("int4_rtn", weight, gram)
    lost = found.weight.clone()
    lost[:, :GROUP] = 0
    moment = gram.diagonal().clone()
    moment[:GROUP] = 0
    with pytest.raises(Failure, match=r"layer: .*channel \d+ has 0.00 times its source's weights"):
        judged(replace(found, weight=lost), weight, moment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", [name for name, row in FORMATS.items() if row.storage])
def test_a_gpu_finds_the_same(form, layer):
    weight, gram = layer
    found, change = made(form, weight, gram), torch.full([COLUMNS], 0.5)
    counts = likeness.importance(gram.diagonal(), change)
    here = likeness.measure(found, weight, change, counts)
    there = likeness.measure(found.to(torch.device("cuda")), weight.cuda(), change.cuda(), counts.cuda())
    for one, other in zip(here.senses, there.senses, strict=True):
        torch.testing.assert_close(one.dot, other.dot.cpu())
        torch.testing.assert_close(one.squares, other.squares.cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(here.inputs, there.inputs.cpu())


@pytest.mark.parametrize("form", ["int8_wo", "int4_rtn", "nvfp4", "fp8"])
def test_parts_of_a_layer_are_the_whole(form, layer, monkeypatch):
    weight, gram = layer
    found = made(form, weight, gram)
    counts = likeness.importance(gram.diagonal(), torch.full([COLUMNS], 0.5))
    whole = likeness.measure(found, weight, torch.full([COLUMNS], 0.5), counts)
    monkeypatch.setitem(likeness._PART, "cpu", 6 * COLUMNS)
    parts = likeness.measure(found, weight, torch.full([COLUMNS], 0.5), counts)
    for one, other in zip(whole.senses, parts.senses, strict=True):
        torch.testing.assert_close(one.dot, other.dot)
        torch.testing.assert_close(one.squares, other.squares)
    torch.testing.assert_close(whole.inputs, parts.inputs)
