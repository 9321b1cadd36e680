"""The facts of a model folder, and one clear sentence for each way in which a folder is not one."""

import json
import struct

import pytest

from trimtab.base.errors import InputError
from trimtab.model.facts import Linear, ModelFacts, inspect
from trimtab.model.headers import read_header

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def tensors(layers: int = 2) -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [16, 8], "model.norm.weight": [8]}
    for n in range(layers):
        shapes[f"model.layers.{n}.self_attn.q_proj.weight"] = [8, 8]
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = [8, 12]
    return shapes


def safetensors(shapes: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> bytes:
    """Returns the bytes of a file of zeros, laid out by hand."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = width
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return raw(header, bytes(place))


def raw(header: object, data: bytes) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors(tensors()))
    return tmp_path


def configure(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def test_facts(folder):
    facts = inspect(folder)
    # embedding 16*8 = 128, norm 8, two blocks of 8*8 + 8*12 = 160: 456 parameters of 2 bytes
    assert (facts.parameters, facts.bytes, facts.linear_parameters) == (456, 912, 320)
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (2, 2, 1, 4)
    assert (facts.architecture, facts.dtype, facts.tied_embeddings) == ("LlamaForCausalLM", "bfloat16", True)
    assert facts.linears[0] == Linear("model.layers.0.mlp.down_proj", out_features=8, in_features=12)
    assert len(facts.linears) == 4


def test_facts_survive_json(folder):
    facts = inspect(folder)
    assert ModelFacts.parse(facts.to_json()) == facts


def test_an_untied_head_counts_and_is_no_linear(folder):
    configure(folder, tie_word_embeddings=False)
    (folder / "model.safetensors").write_bytes(safetensors(tensors() | {"lm_head.weight": [16, 8]}))
    facts = inspect(folder)
    assert (facts.tied_embeddings, facts.parameters) == (False, 456 + 128)
    assert not any("lm_head" in layer.name for layer in facts.linears)


def test_a_tied_head_that_was_saved_all_the_same_counts_once(folder):
    (folder / "model.safetensors").write_bytes(safetensors(tensors() | {"lm_head.weight": [16, 8]}))
    assert inspect(folder).parameters == 456


def shard(folder, first: dict, second: dict, weight_map: dict) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(safetensors(first))
    (folder / "b.safetensors").write_bytes(safetensors(second))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def halves() -> tuple[dict, dict, dict]:
    items = list(tensors().items())
    first, second = dict(items[:3]), dict(items[3:])
    return first, second, dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")


def test_shards_are_read_together(folder):
    shard(folder, *halves())
    assert inspect(folder).parameters == 456


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle(folder):
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def truncate(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])


def lfs(folder):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"
    (folder / "model.safetensors").write_text(text)


def missing_shard(folder):
    shard(folder, *halves())
    (folder / "b.safetensors").unlink()


def lying_index(folder):
    first, second, weight_map = halves()
    shard(folder, first, second, weight_map | {"model.extra.weight": "a.safetensors"})


def twice_in_shards(folder):
    first, second, weight_map = halves()
    shard(folder, first, second | {"model.norm.weight": [8]}, weight_map)


def escaping_index(folder):
    first, second, weight_map = halves()
    shard(folder, first, second, weight_map | {"model.norm.weight": "../a.safetensors"})


def header(folder, entries, data=bytes(16)):
    (folder / "model.safetensors").write_bytes(raw(entries, data))


def stray_name(folder):
    (folder / "model.safetensors").rename(folder / "x.safetensors")


def integers(folder):
    (folder / "model.safetensors").write_bytes(safetensors(tensors(), "I8", 1))


def entry(begin, end, shape=(4,), dtype="BF16"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = [
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("config is no JSON", lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "must be a JSON object, got list"),
    ("no weights", drop_weights, "holds no weights; add model.safetensors"),
    ("pickle", pickle, "pytorch_model.bin is a pickle.*refused.*save_pretrained"),
    ("stray name", stray_name, "holds x.safetensors, but no model.safetensors"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json and"),
    ("remote code", lambda f: configure(f, auto_map={"AutoModel": "x.Y"}), "config.json: needs remote code"),
    (
        "remote tokenizer",
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a", "b"]}}'),
        "tokenizer_config.json: needs remote code",
    ),
    ("quantized", lambda f: configure(f, quantization_config={"a": 1}), "is already quantized; give"),
    ("encoder", lambda f: configure(f, architectures=["BertModel"]), "'BertModel' is no decoder-only model"),
    ("no architecture", lambda f: configure(f, architectures=None), "architecture '' is no"),
    ("no layers", lambda f: configure(f, num_hidden_layers=None), "num_hidden_layers must be a whole number"),
    ("odd heads", lambda f: configure(f, num_attention_heads="2"), "num_attention_heads must be .*got '2'"),
    ("other depth", lambda f: configure(f, num_hidden_layers=3), "is 3, and the weights hold 2"),
    ("head lost", lambda f: configure(f, tie_word_embeddings=False), "lm_head.weight is missing"),
    ("empty file", lambda f: truncate(f, 0), "is cut short: 0 bytes do not hold its header"),
    ("cut in length", lambda f: truncate(f, 5), "is cut short"),
    ("cut in header", lambda f: truncate(f, 100), "is cut short: 100 bytes do not hold its header"),
    ("cut in data", lambda f: truncate(f, -1), r"is cut short: \d+ bytes expected, \d+ found"),
    ("git-LFS pointer", lfs, r"is a git-LFS pointer of 13\d bytes, no weights; run `git lfs pull`"),
    ("missing shard", missing_shard, "b.safetensors is missing, which model.safetensors.index.json names"),
    ("index names too much", lying_index, "a.safetensors lacks model.extra.weight"),
    ("index escapes", escaping_index, "'../a.safetensors' is no name of a safetensors file beside it"),
    ("tensor in two shards", twice_in_shards, "model.norm.weight stands in both a.safe"),
    ("overlap", lambda f: header(f, {"a": entry(0, 8), "b": entry(4, 12)}), "tensor b overlaps"),
    ("gap", lambda f: header(f, {"a": entry(0, 8), "b": entry(10, 18)}), "tensor b leaves a gap"),
    ("size", lambda f: header(f, {"a": entry(0, 16)}), "tensor a has another size than its shape says"),
    ("trailing bytes", lambda f: header(f, {"a": entry(0, 8)}), "has bytes that belong to no tensor"),
    ("unknown type", lambda f: header(f, {"a": entry(0, 8, dtype="Q4")}), "tensor a has the unknown type Q4"),
    (
        "named twice",
        lambda f: header(f, f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}'),
        "tensor a is named twice",
    ),
    ("header is no JSON", lambda f: header(f, "nonsense"), "is not safetensors: its header cannot be read"),
    ("header is a list", lambda f: header(f, []), "is not safetensors: its header cannot be read"),
    ("integers", integers, "holds no floating point weights"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_folder(folder, name, change, sentence):
    change(folder)
    with pytest.raises(InputError, match=sentence) as error:
        inspect(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent", "is not a folder; give the one that holds config.json"),
        ("config.json", "is not a folder"),
        ("model.gguf", "is a GGUF file, which `fetch` converts"),
    ],
)
def test_not_a_folder(folder, name, sentence):
    with pytest.raises(InputError, match=sentence):
        inspect(folder / name)


def test_a_folder_of_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="model.gguf is GGUF, which `fetch` converts"):
        inspect(tmp_path)


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert inspect(folder).parameters == 456


def test_agrees_with_the_safetensors_library(tmp_path):
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"b": numpy.zeros((3, 5), numpy.float32), "a": numpy.zeros((7,), numpy.float16)}
    library.save_file(arrays, tmp_path / "x.safetensors")
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in read_header(tmp_path / "x.safetensors")}
    assert found == {"b": ("F32", (3, 5)), "a": ("F16", (7,))}
