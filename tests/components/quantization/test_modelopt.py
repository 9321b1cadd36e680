"""What ModelOpt writes of the same model, and TensorRT-LLM reads, is what an export holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from safetensors.torch import load_file

from trimtab.families.fusion import groups
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import layer_layout, model_files
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.rounding import quantizers

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
