"""Which files of a folder are the model, as they lie on people's disks."""

import json
import struct

import pytest

from trimtab.base.errors import InputError
from trimtab.model.facts import inspect
from trimtab.model.files import INDEX, companions, is_computed, model_files, weight_files
from trimtab.model.headers import read_tensors

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder, name, tensors, dtype="BF16", width=2):
    """A safetensors file of zeros with tensors of the given shapes."""
    header, place = {}, 0
    for tensor, shape in tensors.items():
        size = width
        for side in shape:
            size *= side
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index; `a` is in the first, `b` in the second."""
    write(tmp_path, SHARDS[0], {"a": [4, 4]})
    write(tmp_path, SHARDS[1], {"b": [4, 4]})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("{}")
    return tmp_path


BESIDE = ["consolidated.safetensors", "model-00003-of-00003.safetensors", "model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_shards_is_left_out_and_named(sharded, name):
    write(sharded, name, {"a": [4, 4]})
    files = weight_files(sharded)
    assert files.names == list(SHARDS)
    assert files.left_out == [name]
    assert set(read_tensors(sharded)) == {"a", "b"}
    assert name not in model_files(sharded)


def test_the_model_is_its_weights_their_index_and_what_stands_beside_them(sharded):
    beside = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "vocab.json"]
    assert companions(sharded) == beside
    assert model_files(sharded) == [*beside, INDEX, *SHARDS]


def test_a_single_file_needs_no_index(tmp_path):
    write(tmp_path, "model.safetensors", {"a": [4, 4]})
    write(tmp_path, "consolidated.safetensors", {"x": [4, 4]})
    files = weight_files(tmp_path)
    assert (files.names, files.index, files.left_out) == (["model.safetensors"], {}, ["consolidated.safetensors"])


def test_an_index_of_shards_that_were_joined_is_left_out(sharded):
    for shard in SHARDS:
        (sharded / shard).unlink()
    write(sharded, "model.safetensors", {"a": [4, 4], "b": [4, 4]})
    assert weight_files(sharded).left_out == [INDEX]
    assert set(read_tensors(sharded)) == {"a", "b"}
    assert INDEX not in model_files(sharded)


def test_a_file_that_stands_for_shards_must_hold_what_they_held(sharded):
    for shard in SHARDS:
        (sharded / shard).unlink()
    write(sharded, "model.safetensors", {"a": [4, 4]})
    with pytest.raises(InputError, match="model.safetensors lacks b, which"):
        read_tensors(sharded)


def test_one_missing_shard_is_not_made_up_for_by_a_single_file(sharded):
    (sharded / SHARDS[1]).unlink()
    write(sharded, "model.safetensors", {"a": [4, 4]})
    with pytest.raises(InputError, match=f"{SHARDS[1]} is missing"):
        weight_files(sharded)


def test_mistrals_own_form_alone_is_refused(tmp_path):
    write(tmp_path, "consolidated-00001-of-00002.safetensors", {"a": [4, 4]})
    with pytest.raises(InputError, match="Mistral's own form.*download the other"):
        weight_files(tmp_path)


#: Stored by old checkpoints of GPT-2, CodeGen, GPT-NeoX and Llama; the last three are parameters.
STORED = [
    ("h.0.attn.bias", [1, 1, 16, 16], True),
    ("h.0.attn.masked_bias", [], True),
    ("transformer.h.0.attn.causal_mask", [1, 1, 16, 16], True),
    ("gpt_neox.layers.3.attention.bias", [1, 1, 16, 16], True),
    ("gpt_neox.layers.3.attention.masked_bias", [], True),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", [8], True),
    ("model.layers.0.attn.bias", [8], False),
    ("gpt_neox.layers.3.attention.dense.bias", [8], False),
    ("model.layers.0.self_attn.q_proj.bias", [8], False),
]


@pytest.mark.parametrize(("name", "shape", "computed"), STORED)
def test_what_transformers_computes_is_told_from_parameters(name, shape, computed):
    assert is_computed(name, shape) is computed


def test_vocab_and_merges_are_a_tokenizer(write_model, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="has no tokenizer.json and"):
        inspect(folder)
    (folder / "merges.txt").write_text("")
    assert inspect(folder).layers == 4


def test_what_is_computed_counts_as_no_parameter(write_model, tmp_path):
    plain = inspect(write_model(tmp_path / "plain"))
    folder = write_model(tmp_path / "old")
    shapes = {tensor.name: list(tensor.shape) for tensor in read_tensors(folder).values()}
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = [8]
    write(folder, "model.safetensors", shapes)
    assert inspect(folder) == plain
