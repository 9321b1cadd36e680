"""How much of a source's layer stands in the stored one: on exports as their methods make them, and on damaged ones."""

from __future__ import annotations

from dataclasses import fields, replace

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
from trimtab.runtime.measure.observe import InputStatistics

ROWS, COLUMNS, GROUP = 64, 128, 32
SETTINGS = {name: Quantization(format=name, group_size=GROUP) for name, row in FORMATS.items() if not row.mixes}


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose last 32 inputs are faint echoes of the others, and have small weights; and inputs, [4000, in].

    So it is in the 8-billion-parameter model that the gate was wrong about.
    """
    torch.manual_seed(0)
    loud = torch.randn(4000, COLUMNS - GROUP)
    faint = 0.05 * loud @ torch.nn.functional.normalize(torch.randn(COLUMNS - GROUP, GROUP), dim=0)
    weight = torch.randn(ROWS, COLUMNS)
    weight[:, -GROUP:] *= 0.015
    return weight, torch.cat([loud, faint], dim=1)


def made(form: str, weight: torch.Tensor, inputs: torch.Tensor) -> Quantized:
    gram = inputs.T @ inputs / len(inputs)
    moment = gram.diagonal().clone()
    seen = Input(amax=4 * moment.sqrt(), second_moment=moment, gram=gram)
    return packed_layers.quantize(form, {"layer": weight}, seen, SETTINGS[form])["layer"]


def sketch(inputs: torch.Tensor) -> torch.Tensor:
    seen = InputStatistics(inputs.shape[1], inputs.device)
    seen.add(inputs)
    return seen.sketch


def judged(found: Quantized, weight: torch.Tensor, inputs: torch.Tensor | None) -> None:
    measured = likeness.measure(found, weight, sketch=None if inputs is None else sketch(inputs))
    check_likeness("layer", found.layout, measured, None)


def output_error(found: Quantized, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """Relative, of the layer's outputs."""
    return float(((scaled_weight(found) - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())


def test_outputs_are_judged_as_inputs_make_them(layer):
    weight, inputs = layer
    found = made("int4_gptq", weight, inputs)
    outputs = likeness.measure(found, weight, sketch=sketch(inputs)).outputs
    assert float(outputs.error) == pytest.approx(output_error(found, weight, inputs), rel=0.1)
    assert float(outputs.error) < output_error(made("int4_rtn", weight, inputs), weight, inputs)


def test_gptq_moves_what_matters_little(layer):
    weight, inputs = layer
    found = made("int4_gptq", weight, inputs)
    plain = likeness.measure(found, weight).plain
    moved = likeness.departure(plain.block_change, plain.block_own, 0)[:, 3].abs()
    assert moved.max() > found.layout.storage.limits.block_gain
    for known in (inputs, None):
        judged(found, weight, known)


def test_inputs_that_go_together_may_trade(layer):
    """As in the first block of an 8-billion-parameter model, where GPTQ halved one input's weights: "input channel 322
    has 0.53 times its source's weights"."""
    weight, inputs = layer
    twins = inputs.clone()
    twins[:, 5] = twins[:, 70]
    weight = weight.clone()
    weight[:, 70] = weight[:, 5] * 1.5
    traded = weight.clone()
    traded[:, 5], traded[:, 70] = 0.5 * weight[:, 5], weight[:, 70] + 0.5 * weight[:, 5]
    found = made("int4_rtn", traded, inputs)
    judged(found, weight, twins)
    for known in (inputs, None):  # which do not go together, or are not known
        with pytest.raises(Failure, match="layer: input channel 5 has 0.5. times its source's weights"):
            judged(found, weight, known)


def test_a_group_of_small_weights_may_make_up_for_others(layer):
    """Also where it reads the loudest inputs: in the 8-billion-parameter model, those of a head that attends to all."""
    weight, inputs = layer
    moved = weight.clone()
    moved[:, -GROUP:] *= -2
    loud = inputs.clone()
    loud[:, -GROUP:] = 20 * torch.randn(len(inputs), GROUP, generator=torch.Generator().manual_seed(0))
    judged(made("int4_rtn", moved, inputs), weight, loud)
    weight = weight.clone()
    weight[:, -GROUP:] *= 10
    with pytest.raises(Failure, match=r"layer: group 3 of output channel \d+ has .* times its source's weights"):
        judged(made("int4_rtn", 10 * moved, inputs), 10 * weight, loud)


def test_faint_weights_of_a_steady_input_may_become_a_bias() -> None:
    """As in an 8-billion-parameter model, where a head that attends to all tokens alike reads nearly the same for each:
    "group 63 of output channel 68 has 13.03 times its source's weights"."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, COLUMNS, generator=generator)
    inputs[:, -GROUP:] = torch.randn(GROUP, generator=generator)  # for all tokens the same
    weight = 0.05 * torch.randn(ROWS, COLUMNS, generator=generator)
    weight[7, :-GROUP] *= 7
    moved = weight.clone()
    moved[7, -GROUP:] *= 8
    compared(moved, weight, inputs)
    with pytest.raises(Failure, match="layer: group 3 of output channel 7 has [78].* times its source's weights"):
        compared(moved, weight)
    weight[7, -GROUP:] *= 2  # no longer faint
    moved[7, -GROUP:] *= 2
    with pytest.raises(Failure, match="layer: group 3 of output channel 7 has [78].* times its source's weights"):
        compared(moved, weight, inputs)


MASSIVE = [3, 40]


@pytest.fixture(scope="module")
def massive() -> torch.Tensor:
    """A weight of which two numbers are most, as where a model makes its massive activations."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[17, MASSIVE] = torch.tensor([200.0, 100.0])
    return weight


def compared(moved: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor | None = None) -> None:
    """Compares what is made of a weight that was moved with that weight, by the limits of four bits."""
    stored = packed_layers.quantize("int8_wo", {"layer": moved}, Input(), SETTINGS["int8_wo"])["layer"]
    four_bits = replace(stored.layout, algo="W4A16_AWQ", group_size=GROUP)
    as_groups = replace(stored, layout=replace(stored.layout, group_size=GROUP))
    measured = likeness.measure(as_groups, weight, sketch=None if inputs is None else sketch(inputs))
    check_likeness("layer", four_bits, measured, None)


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


@pytest.fixture(scope="module")
def loud_tokens() -> torch.Tensor:
    """Inputs of which one in 500 is massive, in two channels, and the others are small there."""
    inputs = torch.randn(4000, COLUMNS, generator=torch.Generator().manual_seed(1))
    inputs[:, MASSIVE] *= 0.1
    inputs[::500, MASSIVE] = 2000.0
    return inputs


def test_an_output_channel_may_take_from_one_massive_input_what_it_gives_to_another(loud_tokens) -> None:
    """As in block 11 of SmolLM2, where a channel's weights of both were halved by NVFP4, of either sign."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[5, MASSIVE] = torch.tensor([12.0, -12.0])
    moved = weight.clone()
    moved[5, MASSIVE] /= 2
    compared(moved, weight, loud_tokens)
    with pytest.raises(Failure, match="layer: output channel 5 has 0.6. times its source's weights"):
        compared(moved, weight, torch.randn(4000, COLUMNS))
    traded = weight.clone()
    traded[:, MASSIVE[0]] /= 2
    with pytest.raises(Failure, match="layer: input channel 3 has 0.50 times"):
        compared(traded, weight, loud_tokens)
    traded[:, MASSIVE[1]] += weight[:, MASSIVE[0]] / 2
    compared(traded, weight, loud_tokens)
    moved[5] = weight[5] / 2
    with pytest.raises(Failure, match="layer: output channel 5 has 0.50 times"):
        compared(moved, weight, loud_tokens)


def test_massive_tokens_do_not_hide_the_others(loud_tokens) -> None:
    """Beside the outputs of a few tokens those of all others would be nothing, and whatever changed them."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    moved = weight.clone()
    moved[:, 64:96] *= 3
    with pytest.raises(Failure, match=r"layer: output channel \d+ has 1.9. times its source's weights"):
        judged(made("int4_rtn", moved, loud_tokens), weight, loud_tokens)


@pytest.mark.parametrize("form", [name for name, row in FORMATS.items() if row.storage])
def test_a_right_export_passes_in_both_senses(form, layer):
    weight, inputs = (each[:, : COLUMNS - GROUP].contiguous() for each in layer)
    found = made(form, weight, inputs)
    for known in (None, sketch(inputs)):
        measured = likeness.measure(found, weight, sketch=known)
        check_likeness("layer", found.layout, measured, None)
        assert measured.cosine > 0.95


@pytest.mark.parametrize("factor", [0.2, 3.0])
@pytest.mark.parametrize("group", [0, 2])
def test_a_wrong_scale_of_a_group_that_matters(group, factor, layer):
    weight, inputs = layer
    found = made("int4_gptq", weight, inputs)
    scale = found.weight_scale.clone()
    scale[17, group] *= factor
    with pytest.raises(Failure, match=f"layer: (group {group} of )?output channel 17 has"):
        judged(replace(found, weight_scale=scale), weight, inputs)


def test_channels_that_calibration_never_saw_count_all_the_same(layer):
    weight, inputs = layer
    found = made("int4_rtn", weight, inputs)
    lost = found.weight.clone()
    lost[:, :GROUP] = 0
    unseen = inputs.clone()
    unseen[:, :GROUP] = 0
    with pytest.raises(Failure, match=r"layer: input channel \d+ has 0.00 times its source's weights"):
        judged(replace(found, weight=lost), weight, unseen)


def same(one: likeness.Sense, other: likeness.Sense) -> None:
    for field in fields(one):
        left, right = (getattr(sense, field.name) for sense in (one, other))
        if field.name != "by_outputs":
            torch.testing.assert_close(left, right.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", [name for name, row in FORMATS.items() if row.storage])
def test_a_gpu_finds_the_same(form, layer):
    weight, inputs = layer
    found, change, seen = made(form, weight, inputs), torch.full([COLUMNS], 0.5), sketch(inputs)
    here = likeness.measure(found, weight, change, seen)
    there = likeness.measure(found.to(torch.device("cuda")), weight.cuda(), change.cuda(), seen.cuda())
    for one, other in zip(here.senses, there.senses, strict=True):
        same(one, other)


@pytest.mark.parametrize("form", ["int8_wo", "int4_rtn", "nvfp4", "fp8"])
def test_parts_of_a_layer_are_the_whole(form, layer, monkeypatch):
    weight, inputs = layer
    found, change, seen = made(form, weight, inputs), torch.full([COLUMNS], 0.5), sketch(inputs)
    whole = likeness.measure(found, weight, change, seen)
    monkeypatch.setitem(likeness._PART, "cpu", 6 * COLUMNS)
    parts = likeness.measure(found, weight, change, seen)
    for one, other in zip(whole.senses, parts.senses, strict=True):
        same(one, other)
