"""Exports as vLLM reads them: compared with compressed-tensors' own unpacking, and with vLLM where it is there."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.runtime.checkpoint import compressed_tensors, layer_layout
from trimtab.runtime.checkpoint.model_files import Export


def translate(export: Path, folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    compressed_tensors.translate(export, folder / "there", folder / "scratch")
    config = json.loads((folder / "there" / "config.json").read_text())
    return config["quantization_config"], load_file(folder / "there" / "model.safetensors")


@pytest.mark.parametrize(("form", "settings", "method"), [
    ("int4_rtn", {"exclude": ["*.down_proj"], "kv_cache": "fp8"}, "compressed-tensors"),
    ("int4_awq", {}, "trimtab-int4"),
    ("int4_gptq", {"group_size": 64}, "trimtab-int4"),
])  # fmt: skip
def test_each_number_is_the_exports(export, tmp_path, form, settings, method):
    source = Export(export(form, **settings))
    config, tensors = translate(source.folder, tmp_path)
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "input_scaled_layers"})
    (group,) = parsed.config_groups.values()
    assert (config["quant_method"], parsed.format, group.targets) == (method, "pack-quantized", ["Linear"])
    size = group.weights.group_size
    assert size == settings.get("group_size", 32) and group.weights.symmetric and group.weights.num_bits == 4
    for name in source.layers:
        layer = source.layer(name)
        packed, scale, shape = (tensors.pop(f"{name}.{part}") for part in ("weight_packed", "weight_scale",
                                                                          "weight_shape"))  # fmt: skip
        assert scale.dtype == torch.bfloat16 and torch.equal(scale, layer.weight_scale)
        assert tuple(shape.tolist()) == layer.shape
        numbers = unpack_from_int32(packed, 4, torch.Size(shape.tolist()))
        assert torch.equal(numbers, layer_layout.unpack_int4(layer.weight))
        weight = numbers.float().unflatten(1, (-1, size)) * scale.float()[..., None]
        assert torch.equal(weight.flatten(1), layer_layout.scaled_weight(layer))
        assert (name in config.get("input_scaled_layers", ())) == layer.scales_inputs
        if layer.scales_inputs:
            assert torch.equal(tensors.pop(f"{name}.pre_quant_scale"), layer.pre_quant_scale)
    own = {f"{name}.{part}" for name in source.layers for part in ("weight", *layer_layout.SCALES)}
    assert sorted(tensors) == [name for name in source.names if name not in own]
    assert all(torch.equal(tensor, source.tensor(name)) for name, tensor in tensors.items())
    assert ("model.layers.0.mlp.down_proj" in config["ignore"]) == bool(settings.get("exclude"))
    assert "lm_head" in config["ignore"] and bool(config.get("kv_cache_scheme")) == ("kv_cache" in settings)


@pytest.mark.parametrize(
    ("form", "kv_cache", "of_weights", "of_inputs"),
    [("fp8", "none", "tensor", "tensor"), ("fp8", "fp8", "tensor", "tensor"),
     ("fp8_per_channel", "fp8", "channel", "token")],
)  # fmt: skip
def test_fp8_with_a_tied_head_keeps_its_numbers(export, tmp_path, form, kv_cache, of_weights, of_inputs):
    source = Export(export(form, kv_cache=kv_cache, exclude=["*.down_proj"]))
    assert compressed_tensors.is_needed(source.folder)
    config, tensors = translate(source.folder, tmp_path)
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    assert (config["quant_method"], parsed.format) == ("compressed-tensors", "float-quantized")
    assert (group.targets, group.weights.strategy, group.weights.dynamic) == (["Linear"], of_weights, False)
    assert (group.input_activations.strategy, group.input_activations.dynamic) == (of_inputs, of_inputs == "token")
    assert all((of.num_bits, of.type) == (8, "float") for of in (group.weights, group.input_activations))
    assert sorted(tensors) == sorted(source.names)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.reshape(source.tensor(name).shape), source.tensor(name))
    scale = tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    assert scale.shape == ((64, 1) if of_weights == "channel" else ())
    assert {"lm_head", "model.layers.0.mlp.down_proj"} <= {*config["ignore"]}
    assert bool(config.get("kv_cache_scheme")) == (kv_cache == "fp8")


@pytest.mark.parametrize(("form", "pack", "size"), [
    ("nvfp4_wo", "nvfp4-pack-quantized", 16), ("mxfp4_wo", "mxfp4-pack-quantized", 32),
    ("nvfp4", "nvfp4-pack-quantized", 16),
])  # fmt: skip
def test_fp4_is_compressed_tensors_own(export, tmp_path, form, pack, size):
    """Its own compressor unpacks every layer to the weights of the export."""
    source = Export(export(form))
    config, tensors = translate(source.folder, tmp_path)
    parsed = QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    assert (config["quant_method"], parsed.format, scheme.format) == ("compressed-tensors", pack, pack)
    assert (scheme.weights.group_size, bool(scheme.input_activations)) == (size, form == "nvfp4")
    compressor = BaseCompressor.get_value_from_registry(pack)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    for name in source.layers:
        own = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{name}.")}
        if form == "nvfp4":
            given = own.pop("input_global_scale")
            assert given.item() == pytest.approx(1 / source.layer(name).input_scale.item())
        weight = compressor.decompress(own, scheme)["weight"]
        # in bfloat16, which holds eight bits
        torch.testing.assert_close(weight.float(), layer_layout.scaled_weight(source.layer(name)), rtol=2**-7, atol=0)


def test_a_mix_becomes_groups_of_layers_by_name(export, tmp_path):
    source = Export(export("mixed_gpu", effective_bits=6, group_size=64))
    config, tensors = translate(source.folder, tmp_path)
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "input_scaled_layers"})
    assert parsed.format == "mixed-precision" and len(parsed.config_groups) == len({*source.layers.values()}) > 1
    forms = {"W4A16_NVFP4": "nvfp4-pack-quantized", "W4A16_AWQ": "pack-quantized", "FP8": "float-quantized"}
    for group in parsed.config_groups.values():
        assert {forms[source.layers[layer].algo] for layer in group.targets} == {group.format}
    assert sorted(layer for group in parsed.config_groups.values() for layer in group.targets) == sorted(source.layers)
    assert {*source.plain_layers} <= {*config["ignore"]}
    for layer in source.layers:
        assert (f"{layer}.weight_packed" in tensors) is (source.layers[layer].algo != "FP8")


def test_fp8_with_a_head_of_its_own_is_read_as_it_is(export, tmp_path):
    for path in export("fp8").iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not compressed_tensors.is_needed(tmp_path)


def test_every_nibble_finds_its_place():
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = compressed_tensors.pack(numbers)
    assert packed.dtype == torch.int32 and packed.shape == (3, 4)
    assert torch.equal(unpack_from_int32(packed, 4, numbers.shape), numbers)
    assert packed[0, 0].item() == 0x76543210


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("mixed", {"effective_bits": 6}, "vLLM reads no W4A16_AWQ beside W8A16; write one format for all"),
        ("int4_rtn", {"exclude": ["*.k_proj"]}, "vLLM fuses model.layers.0.self_attn.q_proj with model.layers.0."
         "self_attn.k_proj, which is in 16 bits; exclude both"),
        ("int4_rtn", {"kv_cache": "int8"}, "vLLM serves no INT8 KV cache here; write 'none' or 'fp8'"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_be_given(export, tmp_path, form, settings, message):
    with pytest.raises(Failure) as failure:
        translate(export(form, **settings), tmp_path)
    assert failure.value.failure_class == "unsupported" and failure.value.reason == message
    assert not (tmp_path / "there").exists() and not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(("part", "change", "message"), [
    ("weight_scale", lambda scale: scale.float() * 1.001, "q_proj.weight_scale is torch.float32, and vLLM would round"),
    ("pre_quant_scale", lambda _: torch.ones(64), "whose pre_quant_scale is another"),
])  # fmt: skip
def test_no_number_is_rounded_and_none_is_left_out(export, tmp_path, part, change, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    source = export("int4_rtn")
    for path in source.iterdir():
        (copy / path.name).symlink_to(path)
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    tensors[name] = change(tensors.get(name))
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=message):
        translate(copy, tmp_path)
