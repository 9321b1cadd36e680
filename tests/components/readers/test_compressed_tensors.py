"""Mixtures of experts as they are translated for vLLM, read by compressed-tensors' own code."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file

from trimtab import families
from trimtab.runtime.checkpoint import compressed_tensors, layer_layout, skeleton
from trimtab.runtime.checkpoint.model_files import Export


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_each_expert_is_the_export_s(model_type, exported, tmp_path) -> None:
    """vLLM looks for these names; a router that its config did not leave out would be taken for INT4."""
    source = Export(exported(model_type, "int4_rtn").folder)
    compressed_tensors.translate(source.folder, tmp_path / "there", tmp_path / "scratch")
    config = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    model = skeleton.skeleton(source.folder)
    found = {name for name, _ in match_named_modules(model, group.targets, parsed.ignore)}
    assert found == set(source.layers)
    family = families.named(model_type)
    experts = [name for name in source.layers if family.is_expert(name)]
    blocks = [number for number, parts in enumerate(family.parts(model.config.to_dict())) if "experts" in parts]
    assert len(experts) == len(blocks) * 4 * 3
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    for name in experts:
        layer = source.layer(name)
        numbers = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, torch.Size(layer.shape))
        weight = numbers.float().unflatten(1, (-1, 32)) * tensors[f"{name}.weight_scale"].float()[..., None]
        assert torch.equal(weight.flatten(1), layer_layout.scaled_weight(layer))
        assert tuple(tensors[f"{name}.weight_shape"].tolist()) == layer.shape
