"""Wrappers against transformers' own: names, logits on text, and every stage on the text model within."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
import wrappers
from torch import nn
from transformers import CONFIG_MAPPING

from trimtab import families
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint import config_file, model_files, skeleton
from trimtab.runtime.parallel import shards

TYPES = [name for name, family in families.BY_TYPE.items() if family.wrapper]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TYPES), ("mistral3", {"text": wrappers.MINISTRAL3}),
]  # fmt: skip
TEXTS = [(name, text) for name in TYPES for text in families.BY_TYPE[name].wrapper.texts.items()]


@pytest.mark.parametrize(("model_type", "text"), TEXTS, ids=[kind for _, (kind, _) in TEXTS])
def test_what_a_text_config_does_not_say_is_what_transformers_takes(model_type: str, text: tuple[str, Any]) -> None:
    kind, described = text
    config = CONFIG_MAPPING[kind]()
    assert all(getattr(config, name) == value for name, value in described.defaults.items())
    found = families.text_config({"model_type": model_type, "text_config": {"model_type": kind, "hidden_size": 64}})
    assert found == {**described.defaults, "model_type": kind, "hidden_size": 64}


@pytest.mark.parametrize(("model_type", "changes"), CASES)
@torch.inference_mode()
def test_the_text_model_alone_gives_the_logits_of_the_wrapper(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Over a text that is longer than windows; Qwen's sections of rotary embeddings are one for text."""
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    reference = wrappers.build(model_type, **changes)
    for tensor in reference.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    loaded, _ = model_files.load(wrappers.write(tmp_path, model_type, **changes), torch.float32)
    assert (loaded(tokens).logits - reference(input_ids=tokens).logits).abs().max() <= 5e-4


@pytest.mark.parametrize("model_type", TYPES)
def test_the_names_are_those_of_the_wrapper(model_type: str, tmp_path: Path) -> None:
    family, folder = families.BY_TYPE[model_type], wrappers.write(tmp_path, model_type)
    model = skeleton.skeleton(folder)
    facts, stored = inspect(folder), decoders.stored(wrappers.build(model_type))
    own = [name for name in stored if not family.is_beside(name, model.config.to_dict())]
    tied = {f"{family.head}.weight"} if facts.tied_embeddings else set()
    assert {*own, *tied} == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert all(model.get_parameter(name).shape == stored[name].shape for name in own)
    assert all("vision" in name or "visual" in name or "projector" in name for name in stored.keys() - own)
    assert len(stored.keys() - own) > 10
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert model.get_submodule(family.blocks) is model.base_model.layers
    assert skeleton.family_of(model) is family
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and family.layer(name)}
    assert {linear.name for linear in facts.linears} == found
    assert facts.layers == decoders.LAYERS
    assert facts.architecture == type(wrappers.build(model_type)).__name__


def test_a_saved_model_keeps_what_stands_beside_its_text_model(tmp_path: Path) -> None:
    source = wrappers.write(tmp_path / "source", "gemma3")
    model, _ = model_files.load(source, torch.bfloat16)
    model.get_submodule("model.language_model.norm").weight.data += 1.0
    model_files.save(model, tmp_path / "saved", source)
    before, after = model_files.Export(source), model_files.Export(tmp_path / "saved")
    assert after.names == before.names
    changed = [name for name in before.names if not torch.equal(before.view(name), after.view(name))]
    assert changed == ["model.language_model.norm.weight"]


def test_another_type_of_weights_is_said_in_every_config(tmp_path: Path) -> None:
    """vLLM reads it from the text model's, transformers from the wrapper's."""
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"depth": 1}}
    config_file.write(tmp_path, config_file.with_dtype(config, torch.float16))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float16"
    assert written["text_config"]["dtype"] == written["text_config"]["torch_dtype"] == "float16"
    assert written["vision_config"] == {"depth": 1}


def test_the_sections_of_rotary_embeddings_stay_in_both_spellings() -> None:
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    found = config_file.both_spellings({"model_type": "qwen2_5_vl_text", "rope_parameters": sections})
    assert found["rope_scaling"] == {"rope_type": "default", "mrope_section": [16, 24, 24]}
    assert found["rope_parameters"] == sections
    assert found["rope_theta"] == 1e6


@pytest.mark.parametrize("model_type", [name for name in TYPES if families.BY_TYPE[name].tensor_parallel])
def test_tensor_parallelism_splits_the_layers_of_the_text_model(model_type: str, tmp_path: Path) -> None:
    family = families.BY_TYPE[model_type]
    cut = shards.cut(skeleton.skeleton(wrappers.write(tmp_path, model_type)), shards.Place(0, 2))
    assert {family.place(name) for name in cut.rows} == {
        (block, layer) for block in range(decoders.LAYERS) for layer in family.row_parallel
    }
    assert len(cut.units) == decoders.LAYERS * (len(family.layers) - len(family.row_parallel))
