"""Each format's export: what its files hold, how near its weights are to the source, and that ModelOpt agrees."""

from __future__ import annotations

import copy
import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file

from trimtab.base import child
from trimtab.base.errors import Failure, InputError
from trimtab.catalog import formats as catalog
from trimtab.components.quantization import work
from trimtab.components.quantization.methods import packed_layers
from trimtab.components.quantization.methods.packed_layers import Input
from trimtab.components.quantization.mixed import sensitivity
from trimtab.families.fusion import groups
from trimtab.model.facts import inspect
from trimtab.model.hardware import target
from trimtab.recipe import Engine, Quantization
from trimtab.runtime.checkpoint import layer_layout, model_files
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.measure import gradients
from trimtab.runtime.rounding import folding, quantizers, scales

#: Format -> bits a weight takes with its scales at most (64 features, groups of 32), relative error of a layer at most.
FORMATS = {
    "int8_wo": (8.6, 0.02),
    "int8_sq": (9.1, 0.05),
    "fp8": (8.6, 0.05),
    "fp8_gptq": (8.6, 0.05),
    "fp8_per_channel": (8.6, 0.05),
    "int4_rtn": (4.6, 0.2),
    "int4_awq": (4.9, 0.3),
    "int4_gptq": (4.9, 0.3),
    "w4a8_awq": (4.9, 0.3),
    "nvfp4": (4.6, 0.3),
    "nvfp4_wo": (4.6, 0.3),
    "mxfp4": (4.4, 0.3),
    "mxfp4_wo": (4.3, 0.3),
}


def test_every_format_that_quantizes_is_tried():
    assert FORMATS.keys() == {name for name, row in catalog.FORMATS.items() if row.storage}


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_quantized(name, export, model):
    bits, _ = FORMATS[name]
    read = Export(export(name))
    assert set(read.layers) == {layer.name for layer in inspect(model).linears}
    layers = [read.layer(name) for name in read.layers]
    assert 8 * sum(layer.nbytes for layer in layers) / sum(prod(layer.shape) for layer in layers) <= bits


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_near_their_source(name, export, model):
    read, source = Export(export(name)), Export(model)
    facts, settings = inspect(model), Quantization(format=name)
    folded = folding.makers(groups(read.layers, "llama"), dict.fromkeys(read.layers, name), settings, facts)
    assert len(folded) == (8 if name in ("nvfp4", "nvfp4_wo", "mxfp4_wo") else 0)  # two in each of four blocks
    for group in groups(read.layers, "llama"):
        norm = f"{group.norm}.weight"
        change = read.tensor(norm).float() / source.tensor(norm).float() if group.norm else 1.0
        for layer in group.layers:
            weight, found = source.tensor(f"{layer}.weight").float(), dequantize(read.layer(layer))
            if layer in folded:
                change = folding.widened(row_gains(folded[layer], read, source), weight.shape[1], facts.head_dim)
            if layer in folded.values():
                found = found / row_gains(layer, read, source)[:, None]
            error = (found * change - weight).norm() / weight.norm()
            assert error.item() < FORMATS[name][1], layer


def row_gains(layer: str, read: Export, source: Export) -> torch.Tensor:
    """The source's part in each stored row: by what it was multiplied, but for rounding."""
    weight = source.tensor(f"{layer}.weight").float()
    return (dequantize(read.layer(layer)) * weight).sum(1) / weight.square().sum(1)


@pytest.mark.parametrize("part", ["v_proj", "up_proj"])
def test_a_scale_in_the_layer_before_is_taken_back_in_the_one_behind(part, export, model):
    """Where values and up_proj stay in 16 bits, they show the scale: another for each row, and one for both query
    heads that share a head of values."""
    read, source = Export(export("nvfp4_wo", exclude=["lm_head", f"*.{part}"])), Export(model)
    behind = {"v_proj": "self_attn.o_proj", "up_proj": "mlp.down_proj"}[part]
    before = f"model.layers.1.{behind.partition('.')[0]}.{part}.weight"
    norm = f"model.layers.1.{'input' if part == 'v_proj' else 'post_attention'}_layernorm.weight"
    gains = read.tensor(before).float() / source.tensor(before).float()
    gains *= read.tensor(norm).float() / source.tensor(norm).float()
    assert gains.amax(1).div(gains.amin(1)).max() < 1 + 2**-6 and gains.mean(1).std() > 0.02
    name = f"model.layers.1.{behind}"
    stored, weight = dequantize(read.layer(name)), source.tensor(f"{name}.weight").float()
    inputs = folding.widened(gains.mean(1), weight.shape[1], inspect(model).head_dim)
    found = (stored * weight).sum(0) / weight.square().sum(0)
    assert (found * inputs - 1).abs().median() < 0.05 and (found - 1).abs().median() > 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_the_engine_runs_it(name, export, model, calibration):
    windows = load_file(calibration / "tokens.safetensors")["tokens"].long()
    expected = TorchEngine(model, Engine(), "cpu").nll(windows)
    engine = TorchEngine(export(name), Engine(), "cpu")
    kernels = engine.kernels()
    assert set(kernels) == {layer.name for layer in inspect(model).linears}
    emulated = name in target("cpu").emulated["torch"]
    assert {kernel["emulated"] for kernel in kernels.values()} == {emulated}
    # That every tensor has a place; what a layer computes is tested in tests/runtime/linear/test_linear.py.
    assert engine.nll(windows) == pytest.approx(expected, rel=0.03)


#: Format -> ModelOpt's preset; its own export of the same model must hold the same bytes.
PRESETS = {
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int4_rtn": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}


def modelopt_export(model: Path, calibration: Path, preset: str, folder: Path) -> Path:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, preset))
    config["algorithm"] = "max"
    for entry in config["quant_cfg"]:
        blocks = (entry.get("cfg") or {}).get("block_sizes") if isinstance(entry.get("cfg"), dict) else None
        if blocks and -1 in blocks:
            blocks[-1] = 32
    loaded, _ = model_files.load(model, torch.float32)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    with torch.inference_mode():
        mtq.quantize(loaded, config, lambda m: m(tokens))
        export_hf_checkpoint(loaded, export_dir=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_modelopt_exports_the_same(name, export, model, calibration, tmp_path):
    theirs, ours = modelopt_export(model, calibration, PRESETS[name], tmp_path), export(name)
    expected, found = Export(theirs), Export(ours)
    for group in groups(expected.layers, "llama"):
        largest = max(expected.layer(layer).weight_scale.max() for layer in group.layers)
        for layer in group.layers:
            assert_same(expected.layer(layer).tensors, found.layer(layer).tensors, name, largest)
    for file, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        read = [json.loads((folder / file).read_text())[key] for folder in (theirs, ours)]
        ignored = "ignore" if "ignore" in read[0] else "exclude_modules"
        read[0][ignored].remove("model.embed_tokens")  # no linear layer, and named only when it is tied
        assert read[0] == read[1]


def assert_same(expected: dict, found: dict, name: str, shared: torch.Tensor) -> None:
    """FP8's scale is one for layers that an engine fuses: ModelOpt leaves it to the engine to round to it once more.
    INT4's scale is rounded to the bfloat16 that is stored before it is used, and not after; and ModelOpt leaves out the
    ones without which TensorRT-LLM does not read it."""
    if name == "int4_rtn":
        found = {part: tensor for part, tensor in found.items() if part != "pre_quant_scale"}
    assert expected.keys() == found.keys()
    rounded = name == "int4_rtn"
    scale = shared if name == "fp8" else expected["weight_scale"]
    torch.testing.assert_close(found["weight_scale"].float(), scale, rtol=2**-8 if rounded else 1e-6, atol=0)
    if "input_scale" in expected:
        torch.testing.assert_close(found["input_scale"], expected["input_scale"])
    different = (expected["weight"].view(torch.uint8) != found["weight"].view(torch.uint8)).float().mean()
    if torch.equal(scale, expected["weight_scale"]):
        assert different <= (0.02 if rounded else 0)


@pytest.mark.parametrize("name", ["int4_rtn", "int4_awq"])
def test_int4_names_a_scale_of_the_input_where_tensorrt_llm_asks_for_one(name, export):
    """Its W4A16_AWQ reads one for every layer that it does not fuse, and none for the others."""
    found = Export(export(name))
    for layer in found.layers:
        scale = found.layer(layer).pre_quant_scale
        assert (scale is not None) == layer.endswith(("o_proj", "down_proj"))
        assert scale is None or found.layer(layer).scales_inputs == (name == "int4_awq")


@pytest.mark.parametrize("name", FORMATS)
def test_slices_change_nothing(name, export, model, calibration, tmp_path, monkeypatch):
    """Two rows at a time, where otherwise a whole matrix of the tiny model fits one slice."""
    monkeypatch.setattr(quantizers, "SLICE", 1)
    quantize(model, tmp_path / "q", calibration, format=name)
    sliced, whole = Export(tmp_path / "q" / "output"), Export(export(name))
    assert sliced.names == whole.names
    for tensor in whole.names:
        torch.testing.assert_close(sliced.tensor(tensor).float(), whole.tensor(tensor).float(), rtol=1e-6, atol=0)


def test_one_scale_for_several_matrices_is_searched_as_for_one():
    generator, moved = torch.Generator().manual_seed(0), 0
    for _ in range(10):
        parts = [torch.randn(6, 8, generator=generator) for _ in range(3)]
        importance = torch.rand(8, generator=generator)
        together = torch.cat(parts)
        expected = scales.searched(together.reshape(1, -1), scales.FP8, importance.repeat(len(together)))[0]
        found = scales.searched_for_all(iter(parts), together.abs().max(), scales.FP8, importance)
        assert found == expected
        moved += int(found != scales.FP8.scale(together.abs().max()))
    assert moved > 5


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_fp4_by_the_largest_weight_is_modelopts(form):
    """NVFP4QTensor's and MXFP4QTensor's numbers: both of the same matrix, but for ties, which MXFP4's rounds down."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None]
    settings = Quantization(format=form, method="nearest")
    found = quantizers.round_weights(form, {"": weight}, settings)[""]
    if form == "nvfp4":
        packed, scale, second = NVFP4QTensor.quantize(weight.clone(), 16)
        assert torch.equal(found.weight_scale_2, second) and torch.equal(found.weight_scale.float(), scale.float())
        expected = packed._quantized_data
    else:
        packed, exponents = MXFP4QTensor.quantize(weight.clone(), 32)
        assert torch.equal(found.weight_scale, exponents.reshape(8, 3))
        expected = packed._quantized_data
    assert torch.equal(layer_layout.unpack_e2m1(found.weight), layer_layout.unpack_e2m1(expected))


def test_codes_of_e2m1():
    """Every number of OCP Microscaling 1.0 and the code that it has there, the even one of a pair lowest."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([positive, -positive[1:], positive[:1]])[None]
    codes = [*range(8), *range(9, 16), 0]
    expected = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert layer_layout.pack_e2m1(numbers)[0].tolist() == expected
    assert torch.equal(layer_layout.unpack_e2m1(layer_layout.pack_e2m1(numbers)), numbers)


SEARCHED = {"nvfp4_wo": 16, "mxfp4_wo": 32}


@pytest.mark.parametrize("pairs", [False, True], ids=["moments", "pairs"])
@pytest.mark.parametrize("form", SEARCHED)
def test_the_scale_of_a_block_is_the_best_of_those_that_can_be_stored(form, pairs):
    """Against every scale within an octave of the largest weight's, by the error of the block's output."""
    size, draw = SEARCHED[form], torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 2 * size, generator=draw), torch.randn(400, 2 * size, generator=draw) ** 3
    x = x @ torch.randn(2 * size, 2 * size, generator=draw)
    gram = x.t() @ x / len(x)
    settings = Quantization(format=form)
    numbers = quantizers.numbers_of(form, [weight])
    importance = gram if pairs else gram.diagonal()
    found = quantizers.row_scales(form, weight, settings, importance, numbers)
    plain = quantizers.row_scales(form, weight, settings, None, numbers)
    moved = 0
    for row in range(6):
        for block in range(2):
            part, here = weight[row, block * size :][:size], slice(block * size, (block + 1) * size)
            counts = gram[here, here] if pairs else gram.diagonal()[here].diag()

            def error(scale, part=part, counts=counts):
                e = numbers.round(part / scale) * scale - part
                return e @ counts @ e

            every = [numbers.stored(plain[row, block] * 2 ** (n / 64)) for n in range(-64, 40)]
            least = min(map(error, every))
            assert error(found[row, block]) <= least * (1 + 1e-4)
            moved += int(found[row, block] != plain[row, block])
    assert moved > 2


@pytest.mark.parametrize("form", SEARCHED)
def test_gptq_on_searched_scales_loses_less_than_nearest_and_that_less_than_by_the_largest_weight(form):
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=draw), torch.randn(600, 64, generator=draw) ** 3
    x = x @ torch.randn(64, 64, generator=draw)
    seen = Input(x.abs().amax(0), x.square().mean(0), x.t() @ x / len(x))
    given = {
        "gptq": (Quantization(format=form), seen),
        "searched": (Quantization(format=form), Input(seen.amax, seen.second_moment)),
        "largest": (Quantization(format=form, method="nearest"), seen),
    }
    errors = {}
    for name, (settings, known) in given.items():
        layer = packed_layers.quantize(form, {"": weight}, known, settings)[""]
        errors[name] = (x @ (dequantize(layer) - weight).t()).square().mean().item()
    assert errors["gptq"] < 0.9 * errors["searched"] < 0.9 * errors["largest"]


def test_unquantized_tensors_keep_16_bits(export):
    for name in FORMATS:
        read = Export(export(name))
        dtypes = {n: read.tensor(n).dtype for n in read.names if not n.endswith("_scale") and "norm" in n}
        assert set(dtypes.values()) == {torch.bfloat16}


def test_excluded_layers_stay(export, model):
    folder = export("int8_wo", exclude=["lm_head", "*.down_proj"])
    read = Export(folder)
    assert read.layers and not [name for name in read.layers if name.endswith("down_proj")]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(read.tensor(name), Export(model).tensor(name))


def test_an_excluded_layer_makes_up_for_the_scale_in_its_norm(export, model):
    """k_proj reads the same norm as q_proj and v_proj, which AWQ scales: its 16-bit weight is scaled back."""
    read, source = Export(export("int4_awq", exclude=["lm_head", "*.k_proj"])), Export(model)
    name, norm = "model.layers.1.self_attn.k_proj", "model.layers.1.input_layernorm.weight"
    assert name not in read.layers and not torch.equal(read.tensor(norm), source.tensor(norm))
    product = read.tensor(f"{name}.weight").float() * read.tensor(norm).float()
    expected = source.tensor(f"{name}.weight").float() * source.tensor(norm).float()
    torch.testing.assert_close(product, expected, rtol=2**-8, atol=0)


def test_an_excluded_layer_without_a_norm_before_it_stays(model, calibration, tmp_path):
    """Its siblings then multiply their own inputs by pre_quant_scale, and it reads the input as it is."""
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    quantize(other, tmp_path / "q", calibration, format="int4_awq", exclude=["lm_head", "*.k_proj"])
    read, source = Export(tmp_path / "q" / "output"), Export(model)
    attention = "model.layers.1.self_attn"
    assert read.has(f"{attention}.q_proj.pre_quant_scale")
    for name in (f"{attention}.k_proj.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(read.tensor(name), source.tensor(name)), name


@pytest.mark.parametrize("number", [1, 3])
def test_the_most_sensitive_groups_stay(number, export, harms, model):
    read = Export(export("int4_rtn", exclude_sensitive=number))
    found = sensitivity.read(harms)
    every = groups([layer.name for layer in inspect(model).linears], "llama")
    worst = sorted(every, key=lambda group: -found[group.layers[0]]["int4_rtn"])[:number]
    kept = {layer.name for layer in inspect(model).linears} - set(read.layers)
    assert kept == {layer for group in worst for layer in group.layers}


def test_mixed_where_the_first_layer_of_a_group_is_excluded(export, model):
    """The harm of a group is kept under k_proj, the first of its layers."""
    read = Export(export("mixed", effective_bits=8, exclude=["lm_head", "*.k_proj"]))
    expected = {layer.name for layer in inspect(model).linears if not layer.name.endswith("k_proj")}
    assert set(read.layers) == expected


CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_the_model_itself(name, export, model):
    dtype = CASTS[name]
    read, source = Export(export(name)), Export(model)
    assert read.layers == {} and read.names == source.names
    assert all(torch.equal(read.tensor(n), source.tensor(n).to(dtype)) for n in read.names)
    assert json.loads((export(name) / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("bits", [4.0, 5.5, 8.0])
def test_mixed_keeps_its_budget(bits, export, model):
    read = Export(export("mixed", effective_bits=bits))
    linears = inspect(model).linears
    per_weight = {name: 4 if layout.group_size else 8 for name, layout in read.layers.items()}
    assert set(per_weight) == {layer.name for layer in linears}
    mean = sum(per_weight[layer.name] * layer.parameters for layer in linears) / sum(x.parameters for x in linears)
    assert mean <= bits + 1e-6
    if bits == 5.5:
        assert set(per_weight.values()) == {4, 8}


@pytest.mark.parametrize(("bits", "algos"), [(4.0, {"W4A16_NVFP4", "W4A16_AWQ"}), (6.0, None)])
def test_a_mix_for_gpus_keeps_its_budget_and_leaves_some_in_16_bits(bits, algos, export, model):
    """What ModelOpt calls MIXED_PRECISION: every quantized layer with its own format, whole groups alike, all others
    named as excluded, in both files."""
    folder = export("mixed_gpu", effective_bits=bits)
    read, sizes = Export(folder), {layer.name: layer.parameters for layer in inspect(model).linears}
    mean = sum(size * (read.layers[name].bits if name in read.layers else 16) for name, size in sizes.items())
    assert mean / sum(sizes.values()) <= bits + 1e-6
    for group in groups(sizes, "llama"):
        assert len({read.layers.get(layer) for layer in group.layers}) == 1
    found = {layout.algo for layout in read.layers.values()}
    assert found <= {"W4A16_NVFP4", "W4A16_AWQ", "FP8"} and (algos is None or found == algos)
    own = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    flat = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert own["quant_algo"] == flat["quant_algo"] == "MIXED_PRECISION"
    assert own["quantized_layers"].keys() == read.layers.keys()
    left = {"lm_head", *(name for name in sizes if name not in read.layers)}
    assert {*own["exclude_modules"]} == {*flat["ignore"]} == left
    assert (len(left) > 1) is (bits > 4)
    assert TorchEngine(folder, Engine(), "cpu").kernels().keys() == read.layers.keys()


def test_time_is_a_second_budget(export, model):
    """Where reading and multiplying take as long, weights alone save no time: half of it is FP8 for all."""
    folder = export("mixed_gpu", effective_bits=8, max_time=0.5, step_tokens=206)
    assert {layout.algo for layout in Export(folder).layers.values()} == {"FP8"}


def test_a_mix_rounds_its_fp8_by_gptq_under_the_scales_of_fp8(export):
    """One for layers that engines fuse, which the largest weight of all of them gives."""
    mixed, alone = export("mixed_gpu", effective_bits=8, max_time=0.5, step_tokens=206), export("fp8_gptq")
    found, own, nearest = (Export(folder) for folder in (mixed, alone, export("fp8")))
    for group in groups(found.layers, "llama"):
        for layer in group.layers:
            scales_of = [each.layer(layer).weight_scale for each in (found, own, nearest)]
            assert torch.equal(scales_of[0], scales_of[1]) and torch.equal(scales_of[1], scales_of[2])
            weights = [each.layer(layer).weight.float() for each in (found, own, nearest)]
            assert torch.equal(weights[0], weights[1]) and (weights[1] != weights[2]).float().mean() > 0.02, layer
        assert len({found.layer(layer).weight_scale.item() for layer in group.layers}) == 1


@pytest.mark.parametrize(("nearest", "form"), [("fp8", "fp8_gptq"), ("int4_rtn", "int4_gptq")])
def test_gptq_leaves_less_error_of_outputs_than_the_nearest_numbers(nearest, form):
    """Of layers that share an input, which is correlated as inputs are; of FP8 they share the scale too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=draw) + 2 * torch.randn(500, 1, generator=draw)
    weights = {name: size * torch.randn(16, 64, generator=draw) for name, size in (("a", 1.0), ("b", 0.3))}
    gram = x.t() @ x / len(x)
    seen = Input(x.abs().amax(0), gram.diagonal().clone(), gram)
    errors = {}
    for each in (nearest, form):
        settings = Quantization(format=each, group_size=32, scale_search="max")
        made = packed_layers.quantize(each, weights, seen, settings)
        differences = {name: dequantize(made[name]) - weight for name, weight in weights.items()}
        errors[each] = {name: float((d @ gram * d).sum()) for name, d in differences.items()}
        if layer_layout.layout_of(each, settings).storage.shares_scale:
            assert made["a"].weight_scale == made["b"].weight_scale == scales.FP8.scale(weights["a"].abs().max())
    assert all(errors[form][name] < 0.7 * errors[nearest][name] for name in weights), errors


@pytest.mark.parametrize(("form", "left"), [("fp8", 1.0), ("fp8_gptq", sensitivity.GPTQ_LEAVES)])
@pytest.mark.parametrize("names", [("2.mlp.down_proj",), ("1.mlp.gate_proj", "1.mlp.up_proj")])
def test_the_harm_of_layers_counts_both_their_roundings(names, form, left, model, calibration, harms):
    """Against the definition, on the tokens that were kept: of weights each output by itself, as far as GPTQ does not
    make up for it; of inputs what they do to all outputs of all layers that read them."""
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    kept, layers = gradients.samples(model, gradients.enough(tokens), ""), [f"model.layers.{name}" for name in names]
    x, g, share = kept[layers[0]]
    assert len(x) == len(g) and len(x) * share == pytest.approx(1.0, rel=0.2)
    amax = load_file(calibration / "statistics.safetensors")[f"{layers[0]}.amax"].max()
    weights = {layer: Export(model).tensor(f"{layer}.weight").float() for layer in layers}
    largest = max(weight.abs().max() for weight in weights.values())
    rounded = layer_layout.round_fp8(x, amax / 448).float()
    expected, moved = 0.0, torch.zeros_like(x)
    for layer, weight in weights.items():
        change = rounded @ (weight - layer_layout.round_fp8(weight, largest / 448).float()).t()
        expected += 0.5 * left * share * (kept[layer].gradients * change).square().sum().item()
        moved += kept[layer].gradients @ weight
    expected += 0.5 * share * (moved * (x - rounded)).square().sum().item()
    found = sensitivity.read(harms)
    assert found[layers[0]][form] == pytest.approx(expected, rel=1e-3)
    for each in found.values():
        assert each["int8_wo"] < each["nvfp4_wo"] < each["nvfp4"] and each["int4_gptq"] < each["int4_rtn"]


@pytest.mark.parametrize(("kv_cache", "largest"), [("fp8", 448), ("int8", 127), ("nvfp4", 448)])
def test_the_scales_of_a_kv_cache_are_those_of_the_measured_ranges(kv_cache, largest, export, calibration):
    read = Export(export("int8_wo", kv_cache=kv_cache))
    ranges = load_file(calibration / "statistics.safetensors")
    assert read.kv_cache_algo == kv_cache.upper()
    for block in range(4):
        attention = f"model.layers.{block}.self_attn"
        for part, kind in (("k_proj.k_scale", "key_amax"), ("v_proj.v_scale", "value_amax")):
            assert read.tensor(f"{attention}.{part}").item() == pytest.approx(ranges[kind][block].item() / largest)


# --- what is refused, and what survives ------------------------------------------------------------------------


def quantize(model, folder, calibration=None, **settings):
    (folder / "output").mkdir(parents=True, exist_ok=True)
    trees = (tree and str(tree) for tree in (model, calibration, None))
    parameters = {"group_size": 32, **settings}
    return work.quantize(*trees, str(folder / "output"), str(folder / "scratch"), parameters)


def test_measurements_of_another_model_are_refused(model, calibration, tmp_path):
    import tiny

    other = tiny.write_model(tmp_path / "other", layers=4, seed=1)
    with pytest.raises(InputError, match=r"calibration: describes another model \(fingerprint [0-9a-f]{12}\)"):
        quantize(other, tmp_path / "q", calibration, format="fp8")


def test_an_odd_number_of_output_features_is_unsupported_in_int4(model, tmp_path):
    """Refused by `hardware.check` before any work; and here, where a recipe comes from elsewhere."""
    odd, name = shutil.copytree(model, tmp_path / "odd"), "model.layers.2.mlp.gate_proj"
    tensors = load_file(odd / "model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1].contiguous()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match=f"int4_rtn stores output features in pairs, and {name} has 127; add") as caught:
        quantize(odd, tmp_path / "q", format="int4_rtn")
    assert caught.value.failure_class == "unsupported"
    quantize(odd, tmp_path / "q", format="int4_rtn", exclude=["lm_head", name])


NOT_FINITE = {
    "model.layers.2.mlp.up_proj.weight": torch.nan,
    "model.layers.0.self_attn.o_proj.weight": -torch.inf,
    "model.layers.3.input_layernorm.weight": torch.inf,
    "model.embed_tokens.weight": torch.nan,
}


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("form", ["int8_wo", "int4_rtn", "bf16"])
def test_weights_that_are_not_finite_are_refused(name, form, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[name].view(-1)[5] = NOT_FINITE[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model: {name} holds NaN or infinity; download it again"):
        quantize(broken, tmp_path / "q", format=form)
    assert not list((tmp_path / "q").rglob("model*.safetensors"))


def test_a_kill_between_shards_costs_only_the_open_one(model, calibration, monkeypatch, tmp_path):
    from trimtab.runtime.checkpoint import stream

    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    arguments = (str(model), str(calibration), None)
    settings = {"format": "int4_awq", "group_size": 32}
    work.quantize(*arguments, str(tmp_path / "whole"), str(tmp_path / "s0"), settings)

    converted = []
    convert = work._Shards.__call__

    def counting(self, names, title):
        if len(converted) == 4:
            raise KeyboardInterrupt
        converted.append(names)
        return convert(self, names, title)

    monkeypatch.setattr(work._Shards, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        work.quantize(*arguments, str(tmp_path / "cut"), str(tmp_path / "s1"), settings)
    assert not list((tmp_path / "cut").iterdir())
    before = list(converted)
    converted[:] = []
    monkeypatch.setattr(work._Shards, "__call__", lambda *call: converted.append(call[1]) or convert(*call))
    work.quantize(*arguments, str(tmp_path / "cut"), str(tmp_path / "s1"), settings)
    assert not any(names in before for names in converted)
    cut, whole = Export(tmp_path / "cut"), Export(tmp_path / "whole")
    assert cut.names == whole.names and all(torch.equal(cut.tensor(n), whole.tensor(n)) for n in cut.names)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 6  # the embedding, the last norm, four blocks
    assert not (tmp_path / "s1" / "shards").exists()


@pytest.mark.slow
def test_memory_holds_no_second_copy_of_the_largest_tensor(write_model, tmp_path):
    """An embedding of 400 MB: its file's pages count, and nothing else of its size."""
    peaks = {}
    for vocab in (64, 400_000):
        source, folder = write_model(tmp_path / str(vocab), layers=1, hidden=512, vocab=vocab), tmp_path / f"q{vocab}"
        (folder / "output").mkdir(parents=True)
        trees = {"checkpoint": str(source), "calibration": None, "sensitivity": None}
        places = {"output": str(folder / "output"), "scratch": str(folder / "scratch")}
        done = child.call(
            "trimtab.components.quantization.work:quantize", **trees, **places, parameters={"format": "int4_rtn"}
        )
        peaks[vocab] = done.peak_memory_bytes
    assert peaks[400_000] - peaks[64] < 1.5 * 400_000 * 512 * 2


@pytest.mark.parametrize("what", ["weights", "one layer of two", "inputs", "weights and inputs"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_all_zero_gets_scales_that_are_valid(form, what):
    """Layers that pruning emptied, and inputs that calibration never saw: finite, positive scales, also in float16."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(64, 64, generator=draw) for name in ("a", "b")}
    x = torch.randn(128, 64, generator=draw)
    if what.startswith("weights"):
        weights = {name: torch.zeros(64, 64) for name in weights}
    if what == "one layer of two":
        weights["a"] = torch.zeros(64, 64)
    if what.endswith("inputs"):
        x = torch.zeros(128, 64)
    settings = Quantization(format=form, group_size=32)
    seen = Input(x.abs().amax(0), x.square().mean(0), x.t() @ x)
    scale = packed_layers.channel_scale(form, weights, seen, settings)
    if scale is not None:
        assert torch.isfinite(scale).all() and (scale > 0).all()
        weights, seen = {name: weight * scale for name, weight in weights.items()}, seen.scaled(scale)
    for name, layer in packed_layers.quantize(form, weights, seen, settings).items():
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            found = layer.tensors.get(part)
            if found is not None and found.dtype != torch.uint8:  # e8m0 is an exponent, and 0 one of them
                assert torch.isfinite(found.float()).all() and (found.half() > 0).all(), part
        back = dequantize(layer)
        assert torch.isfinite(back).all()
        if not weights[name].any():
            assert not back.any()
