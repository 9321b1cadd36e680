"""What a refusal says to do is done, and the model is admitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.base.errors import InputError
from trimtab.model.admission import admit


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model")


def test_a_row_is_added_for_a_token(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=r"model\.resize_token_embeddings\(len\(tokenizer\)\)"):
        admit(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(len(tokenizer))
    loaded.save_pretrained(tmp_path / "longer")
    tokenizer.save_pretrained(tmp_path / "longer")
    assert admit(tmp_path / "longer").facts.vocab_size == len(tokenizer)


@pytest.fixture
def two_heads(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="has other numbers than model.embed_tokens.weight"):
        admit(model)
    return model


def test_a_head_that_was_trained_is_untied(two_heads):
    config = json.loads((two_heads / "config.json").read_text()) | {"tie_word_embeddings": False}
    (two_heads / "config.json").write_text(json.dumps(config))
    assert not admit(two_heads).facts.tied_embeddings


def test_a_head_that_was_left_over_is_dropped(two_heads, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(two_heads)
    loaded.get_output_embeddings().weight = loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(two_heads).save_pretrained(tmp_path / "tied")
    assert admit(tmp_path / "tied").facts.tied_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_an_adapter_is_merged(model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="merge it first"):
        admit(tmp_path / "adapter")
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "merged")
    assert admit(tmp_path / "merged").facts.layers == 2


def test_a_snapshot_is_given_by_its_folder(model, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    shutil.copytree(model, snapshot)
    with pytest.raises(InputError) as error:
        admit(tmp_path / "models--a--b")
    assert admit(str(error.value).rpartition("a snapshot: ")[2]).facts.layers == 2
