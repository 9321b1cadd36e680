"""What is refused before a plan, each in one sentence with the next step; and that the step is the right one."""

import json
import struct

import pytest

from trimtab.base.errors import InputError
from trimtab.model.admission import admit
from trimtab.model.configured import ties_embeddings
from trimtab.model.headers import read_tensors


@pytest.fixture
def folder(write_model, tmp_path):
    """A Llama of zeros with a vocabulary of 64, tied."""
    return write_model(tmp_path / "model")


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def add_head(folder, value):
    """Gives the model a lm_head.weight of its own, each byte `value`; the embedding's are 0."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["lm_head.weight"] = {"dtype": "BF16", "shape": [64, 64], "data_offsets": [len(tensors), len(tensors) + 8192]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors + bytes([value]) * 8192)


def tokenizer(*added, size=64, model=None):
    """A tokenizer.json with `size` tokens in its vocabulary and others added behind."""
    vocabulary = model or {f"t{number}": number for number in range(size)}
    return {
        "model": {"vocab": vocabulary},
        "added_tokens": [{"id": size + n, "content": text, "special": s} for n, (text, s) in enumerate(added)],
    }


def test_a_model_is_admitted_with_its_files(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    found = admit(folder)
    assert found.facts.layers == 4
    assert {name: path.name for name, path in found.files.items()} == {
        name: name for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert found.left_out == ["pytorch_model.bin"]


QUANTIZED = [
    ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config of config.json, 'awq'"),
    ("config.json", {"compression_config": {"a": 1}}, "compression_config of config.json"),
    ("hf_quant_config.json", {}, "hf_quant_config.json"),
    ("quantize_config.json", {"bits": 4}, "quantize_config.json"),
    ("quant_config.json", {"w_bit": 4}, "quant_config.json"),
]


@pytest.mark.parametrize(("name", "content", "said"), QUANTIZED, ids=[case[2] for case in QUANTIZED])
def test_an_already_quantized_source(folder, name, content, said):
    if name == "config.json":
        configure(folder, **content)
    else:
        write(folder, name, content)
    with pytest.raises(InputError) as error:
        admit(folder)
    assert f"{said} says that it is already quantized; give the 16-bit model it was made from" in str(error.value)


def test_a_quantization_of_null_is_none(folder):
    configure(folder, quantization_config=None)
    assert admit(folder).facts.layers == 4


def test_an_adapter_is_merged_first(tmp_path):
    write(tmp_path, "adapter_config.json", {"base_model_name_or_path": "org/base"})
    with pytest.raises(InputError, match=r"an adapter of org/base, no model; merge it first: AutoPeft.*save_pre"):
        admit(tmp_path)


def test_an_adapter_beside_a_model(folder):
    write(folder, "adapter_config.json", {})
    with pytest.raises(InputError, match="if the model has it merged, remove adapter_config.json"):
        admit(folder)


KINDS = [("gpt2", "Conv1D"), ("gpt_neo", "by repetition"), ("zamba2", "recurrent layers")]


@pytest.mark.parametrize(("kind", "reason"), KINDS)
def test_a_layout_that_is_not_described_is_refused_for_what_it_is(tmp_path, kind, reason):
    write(tmp_path, "config.json", {"model_type": kind, "architectures": ["X"]})
    with pytest.raises(InputError, match=f"model_type '{kind}' .*{reason}.*, which is not supported yet; give a mod"):
        admit(tmp_path)


def test_the_cache_above_a_snapshot(write_model, tmp_path):
    snapshot = write_model(tmp_path / "models--org--name" / "snapshots" / "abc")
    with pytest.raises(InputError, match=f"give a snapshot: {snapshot}"):
        admit(tmp_path / "models--org--name")


def test_a_snapshot_of_the_hubs_cache(folder, tmp_path):
    """Its files are links to blobs, named by digest, outside the folder."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    found = admit(snapshot)
    assert found.files == {
        "config.json": blobs / "0",
        "model.safetensors": blobs / "1",
        "tokenizer.json": blobs / "2",
    }


def test_a_link_to_anything_else_is_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="generation_config.json: is a link that leaves the folder.*by a copy"):
        admit(folder)


LONGER = [
    ("a word", tokenizer(size=65), {}),
    ("a token that is not special", tokenizer(("<think>", False)), {}),
    ("padding", tokenizer(("[PAD]", True)), {"pad_token": "[PAD]"}),
    ("padding, spelled out", tokenizer(("[PAD]", True)), {"pad_token": {"content": "[PAD]"}}),
    ("a token of the chat template", tokenizer(("<|im_start|>", True)), {"chat_template": "{{'<|im_start|>'}}"}),
    ("Unigram", tokenizer(model=[[f"t{n}", -1.0] for n in range(65)]), {}),
]


@pytest.mark.parametrize(("content", "config"), [case[1:] for case in LONGER], ids=[case[0] for case in LONGER])
def test_a_tokenizer_longer_than_the_embedding(folder, content, config):
    write(folder, "tokenizer.json", content)
    write(folder, "tokenizer_config.json", config)
    with pytest.raises(InputError, match=r"has token 64 \(.*\), and the embedding only 64 rows; remove the token"):
        admit(folder)


def test_tokens_beside_a_vocabulary_of_files(folder):
    (folder / "tokenizer.json").unlink()
    write(folder, "vocab.json", {"a": 0})
    write(folder, "merges.txt", "")
    assert admit(folder).facts.vocab_size == 64
    write(folder, "added_tokens.json", {"[PAD]": 64})
    with pytest.raises(InputError, match=r"has token 64 \('\[PAD\]'\)"):
        admit(folder)


def test_a_special_token_without_a_role_may_lie_behind_the_embedding(folder):
    """As in Gemma 3 1B: a vocabulary of 262,144, and <image_soft_token> is token 262,144."""
    write(folder, "tokenizer.json", tokenizer(("<image_soft_token>", True)))
    write(folder, "tokenizer_config.json", {"image_token": "<image_soft_token>", "bos_token": "t0"})
    assert admit(folder).facts.vocab_size == 64


def test_a_vocabulary_of_another_size_than_the_embedding(folder):
    configure(folder, vocab_size=60)
    with pytest.raises(InputError, match=r"vocab_size is 60, and model.embed_tokens.weight has 64 rows; write 64"):
        admit(folder)


def test_a_tied_flag_with_another_head(folder):
    add_head(folder, 1)
    with pytest.raises(InputError, match="lm_head.weight has other numbers than model.embed_tokens.weight"):
        admit(folder)
    configure(folder, tie_word_embeddings=False)  # the remedy
    assert not admit(folder).facts.tied_embeddings


def test_a_tied_head_that_was_stored_all_the_same(folder):
    without = admit(folder).facts
    add_head(folder, 0)
    assert "lm_head.weight" in read_tensors(folder)
    assert admit(folder).facts == without


def test_what_ties_where_the_config_does_not_say():
    """By what transformers' own classes have."""
    from transformers import CONFIG_MAPPING

    for kind in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text", "cohere", "falcon"):
        default = CONFIG_MAPPING[kind]().tie_word_embeddings
        assert ties_embeddings({"model_type": kind}) == bool(default), kind
    assert ties_embeddings({"model_type": "llama", "tie_word_embeddings": True})
    assert not ties_embeddings({"model_type": "gemma", "tie_word_embeddings": False})
