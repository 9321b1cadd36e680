"""ModelOpt's own export of the same models in the same formats: its tensors' names, shapes, types, and exclusions."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

#: Format -> ModelOpt's preset.
PRESETS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
#: Modules that ModelOpt names in its exclusions and that are no linear layers, so that no reader asks for them: an
#: embedding, where it is not tied; a convolution.
NO_LAYERS = ("embed_tokens", "embeddings", "conv1d")
#: ModelOpt 0.47 leaves this at the end of names that it took from transformers' modules for those of the checkpoint.
SENTINEL = ".\0backbone.pt_name_sentinel"


def export(source: Path, calibration: Path, preset: str, folder: Path) -> Path:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, preset)) | {"algorithm": "max"}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(model, config, lambda network: network(tokens))
        export_hf_checkpoint(model, export_dir=folder)
    return folder


def tensors(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    files = (load_file(path) for path in folder.glob("*.safetensors"))
    return {name: ([*tensor.shape], tensor.dtype) for file in files for name, tensor in file.items()}


def said(folder: Path, file: str, field: str) -> dict[str, Any]:
    """What a file says of the quantization, the exclusions as a set of linear layers."""
    found = json.loads((folder / file).read_text())[field]
    name = "ignore" if "ignore" in found else "exclude_modules"
    left_out = {excluded.removesuffix(SENTINEL) for excluded in found[name]}
    return found | {name: {excluded for excluded in left_out if not excluded.endswith(NO_LAYERS)}}


@pytest.mark.parametrize("form", PRESETS)
@pytest.mark.parametrize("model_type", ["qwen3", "mixtral", "qwen3_moe", "qwen3_5_text"])
def test_modelopt_writes_the_same(model_type, form, exported, tmp_path) -> None:
    ours, source, calibration = exported(model_type, form)
    theirs = export(source, calibration, PRESETS[form], tmp_path)
    assert tensors(ours) == tensors(theirs)
    for file, field in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        assert said(ours, file, field) == said(theirs, file, field)


def test_nemotron_h_keeps_its_attention_as_nvidia_publishes_it(exported, tmp_path) -> None:
    """ModelOpt's preset rounds it; NVIDIA's checkpoints in FP8 do not. All else is the same, but that transformers
    holds the bias of the router in float32, whatever the file has, here 16 bits."""
    ours, source, calibration = exported("nemotron_h", "fp8")
    theirs = export(source, calibration, PRESETS["fp8"], tmp_path)
    attention = tuple(f"backbone.layers.1.mixer.{name}_proj." for name in "qkvo")
    bias = "backbone.layers.3.mixer.gate.e_score_correction_bias"
    found, expected = (
        {name: how for name, how in tensors(folder).items() if not name.startswith(attention) and name != bias}
        for folder in (ours, theirs)
    )
    assert found == expected
    kept = {name: how[1] for name, how in tensors(ours).items() if name.startswith(attention)}
    assert kept == {f"{layer}weight": torch.bfloat16 for layer in attention}
    config = said(ours, "hf_quant_config.json", "quantization"), said(theirs, "hf_quant_config.json", "quantization")
    left_out = [one.pop("exclude_modules") for one in config]
    assert config[0] == config[1] and left_out[0] == left_out[1] | {"backbone.layers.1*"}
