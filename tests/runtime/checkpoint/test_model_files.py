"""Checkpoints: plain ones round-trip, exports describe themselves."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trimtab.base.errors import Failure, InputError
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.checkpoint.layer_layout import Layout, dequantize
from trimtab.runtime.checkpoint.model_files import Export

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model_folder(plain_folder: Path, tmp_path: Path) -> Path:
    """The plain model with a tokenizer of three words."""
    folder = tmp_path / "model"
    shutil.copytree(plain_folder, folder)
    words = models.WordLevel({"<unk>": 0, "tide": 1, "turns": 2}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_checkpoint_round_trips(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = model_files.load(model_folder, torch.bfloat16)
    assert not model.training
    model_files.save(model, tmp_path / "copy", model_folder)
    again, tokenizer = model_files.load(tmp_path / "copy", torch.float32)
    assert again.dtype == torch.float32
    assert tokenizer.vocab_size == 3
    for (name, before), after in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(before.float(), after), name


def test_what_stands_beside_the_weights_is_kept_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    """transformers refuses to save a temperature with do_sample false, and names tokenizers by classes of its own."""
    settings = '{"temperature": 0.7, "do_sample": false, "eos_token_id": 2}'
    (model_folder / "generation_config.json").write_text(settings)
    model, _ = model_files.load(model_folder, torch.bfloat16)
    model_files.save(model, tmp_path / "copy", model_folder)
    for path in model_folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes(), path.name
    assert model_files.end_tokens(tmp_path / "copy") == [2]


def test_a_model_without_a_generation_config_gets_none(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "generation_config.json").unlink()
    model, _ = model_files.load(model_folder, torch.bfloat16)
    model_files.save(model, tmp_path / "copy", model_folder)
    assert not (tmp_path / "copy" / "generation_config.json").exists()


def test_a_missing_tensor_is_not_initialised_at_random(model_folder: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, model_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks {UP}.weight"):
        model_files.load(model_folder, torch.float32)


BAD_FOLDERS = {
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_bad_input(model_folder: Path, case: str) -> None:
    BAD_FOLDERS[case](model_folder)
    with pytest.raises(InputError):
        model_files.load(model_folder, torch.float32)


def test_a_plain_checkpoint_has_no_quantized_layers(plain_folder: Path) -> None:
    export = Export(plain_folder)
    assert export.layers == {}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("int8_wo", Layout("W8A16")),
        ("int8_sq", Layout("W8A8_SQ_PER_CHANNEL")),
        ("fp8", Layout("FP8")),
        ("int4_awq_g64", Layout("W4A16_AWQ", 64)),
    ],
)
def test_a_uniform_export_quantizes_every_linear(exported: Any, name: str, layout: Layout) -> None:
    export = Export(exported(name).folder)
    assert len(export.layers) == 14
    assert set(export.layers.values()) == {layout}
    weights = sum(prod(export.layer(layer).shape) for layer in export.layers)
    assert weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


def test_a_mixed_export_says_how_each_layer_is_stored(exported: Any) -> None:
    export = Export(exported("mixed").folder)
    assert export.layers[UP] == Layout("W4A16_AWQ", 32)
    assert export.layers[UP.replace("0", "1")] == Layout("W8A16")
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    channels = 2 * 64 + 2 * 32 + 2 * 128 + 64
    found = sum(export.layer(layer).nbytes for layer in export.layers)
    assert found == weights // 2 + weights // 32 * 4 + weights + channels * 4


@pytest.mark.parametrize(
    ("name", "error"),
    [("int8_wo", 0.01), ("int8_sq", 0.02), ("fp8", 0.04), ("int4_rtn_g32", 0.12), ("int4_awq_g32", 0.12)],
)
def test_dequantized_weights_are_near_the_original(
    original: Any, exported: Any, name: str, error: float
) -> None:
    export = Export(exported(name).folder)
    # AWQ folds the input scales of the other layers into the layer norms before them.
    parts = ("o_proj", "down_proj") if name.startswith("int4_awq") else ("proj",)
    layers = [layer for layer in export.layers if layer.endswith(parts)]
    assert len(layers) >= 4
    for layer in layers:
        weight, found = original.get_submodule(layer).weight, dequantize(export.layer(layer))
        assert found.dtype == torch.float32
        assert (found - weight).norm() < error * weight.norm(), layer


def test_config_json_alone_is_enough(exported: Any, tmp_path: Path) -> None:
    folder = exported("mixed").folder
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "hf_quant_config.json").unlink()
    assert Export(tmp_path).layers == Export(folder).layers


def test_shards_are_read_through_their_index(exported: Any, tmp_path: Path) -> None:
    folder = exported("int8_wo").folder
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, sharded = Export(folder), Export(tmp_path)
    assert sharded.layers == whole.layers
    assert torch.equal(dequantize(sharded.layer(UP)), dequantize(whole.layer(UP)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' cannot be read"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo NVFP4_AWQ cannot be read"),
    ],
)
def test_unknown_quantization_is_unsupported(
    plain_folder: Path, tmp_path: Path, settings: dict, words: str
) -> None:
    shutil.copytree(plain_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(Failure, match=words) as caught:
        _ = Export(tmp_path).layers
    assert caught.value.failure_class == "unsupported"
