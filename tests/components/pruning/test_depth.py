"""A model without some of its blocks computes what the whole one does when those blocks are passed by."""

from __future__ import annotations

import json
from pathlib import Path

import decoders
import pytest
import torch
from torch import nn

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.components.pruning.structured import writing
from trimtab.components.pruning.structured.depth import without
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint import model_files


class Bypass(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden_states


def prune(source: Path, removed: list[int], folder: Path) -> Path:
    folder.mkdir()
    writing.write(source, without(source, removed), folder, folder / "scratch")
    return folder


@pytest.mark.parametrize(
    "model_type",
    ["llama", "smollm3", "qwen2", "gemma3_text", "exaone4", "olmo3", "cohere2", "gemma2", "vaultgemma", "granite",
     "ministral3", "nanochat", "apertus", "jais2", "nemotron", "gpt_bigcode", "qwen3_5_text", "qwen3_next", "lfm2",
     "granitemoehybrid", "mamba2"],
)  # fmt: skip
@torch.inference_mode()
def test_what_goes_by_block_moves_with_the_blocks(model_type: str, tmp_path: Path) -> None:
    source = decoders.write(tmp_path / "source", model_type)
    left = prune(source, [0], tmp_path / "left")
    whole, pruned = decoders.as_written(model_type), model_files.load(left, torch.float32)[0]
    blocks = whole.get_submodule(families.BY_TYPE[model_type].blocks)
    blocks[0] = Bypass(blocks[0])
    tokens = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(1))  # three windows long
    expected, found = (model(tokens, use_cache=False).logits for model in (whole, pruned))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("model_type", "field"), [("bloom", "n_layer"), ("mpt", "n_layers"), ("gptj", "n_layer")])
def test_a_config_counts_its_blocks_in_a_field_of_its_own(model_type: str, field: str, tmp_path: Path) -> None:
    left = prune(decoders.write(tmp_path / "source", model_type), [1], tmp_path / "left")
    config = json.loads((left / "config.json").read_text())
    assert config[field] == inspect(left).layers == 3
    assert "num_hidden_layers" not in config


def test_counts_of_blocks_are_of_those_that_stay(tmp_path: Path) -> None:
    left = prune(decoders.write(tmp_path / "source", "qwen2"), [0], tmp_path / "left")
    config = json.loads((left / "config.json").read_text())
    assert config["max_window_layers"] == 1  # of two without a window, one is left
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


def test_a_list_that_may_go_by_block_is_not_kept_in_silence(tmp_path: Path) -> None:
    source = decoders.write(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1, 1, 0, 1]}))
    with pytest.raises(Failure, match="no_rope_layers has as many entries as the model has blocks.*another method"):
        without(source, [0])


def test_blocks_that_predict_further_tokens_move_up_behind_the_last(tmp_path: Path) -> None:
    source = decoders.write(tmp_path / "source", "deepseek_v3")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    rename = without(source, [1]).rename
    assert [rename(f"model.layers.{n}.enorm.weight") for n in (1, 3, 4)] == [
        None, "model.layers.2.enorm.weight", "model.layers.3.enorm.weight"
    ]  # fmt: skip


def test_a_block_with_attention_stays(tmp_path: Path) -> None:
    source = decoders.write(tmp_path / "source", "lfm2")  # two of four have attention
    with pytest.raises(Failure, match="prune.blocks: 2: of 2 blocks with attention none would be left; write fewer"):
        without(source, [1, 2])
    assert without(source, [0, 1]).config.layer_types == ["full_attention", "conv"]
