"""Where models come from, as people have them: the hub's cache, folders of any name, GGUF in one file and in parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from trimtab import stages
from trimtab.base.errors import InputError, Transient
from trimtab.components.fetch import gguf, source
from trimtab.model.licence import LICENCE, licence_of
from trimtab.store import open_store
from trimtab.store.store import Store

HIDDEN, LAYERS, VOCABULARY = 32, 2, 300


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def zeros(write_model: Callable[..., Path], tmp_path: Path) -> Path:
    return write_model(tmp_path / "zeros")


def names(store: Store, tree) -> list[str]:
    return sorted(store.manifest(tree).files)


def test_a_snapshot_of_the_hubs_cache_is_stored_with_its_content(zeros, store, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    shutil.copytree(zeros, tmp_path / "hub" / "blobs")
    snapshot.mkdir(parents=True)
    for path in zeros.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert source.fetch(str(snapshot), store).digest == source.fetch(str(zeros), store).digest
    assert source.check(str(snapshot)) == str(snapshot)


def test_what_is_not_the_model_is_left_out_and_named(zeros, store, capsys):
    tree = source.fetch(str(zeros), store)
    (zeros / "consolidated.safetensors").write_bytes((zeros / "model.safetensors").read_bytes())
    (zeros / "original").mkdir()
    (zeros / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    capsys.readouterr()
    assert source.fetch(str(zeros), store).digest == tree.digest
    assert "left out, not the model: consolidated.safetensors" in capsys.readouterr().err


def test_a_path_that_holds_trees_is_a_folder(zeros, store, tmp_path):
    shutil.copytree(zeros, tmp_path / "trees" / "oak")
    assert source.fetch(str(tmp_path / "trees" / "oak"), store).bytes > 0


def test_a_tree_of_another_store_is_fetched(zeros, store, tmp_path):
    other = source.fetch(str(zeros), open_store(str(tmp_path / "other")))
    assert source.check(other.uri) == other.uri
    assert source.fetch(other.uri, store).digest == other.digest


@pytest.mark.parametrize("scheme", ["", "s3://", "minio://"])
def test_a_model_artifact_of_an_earlier_run_names_its_tree(scheme, zeros, store, tmp_path, s3_server, monkeypatch):
    """As the page of the run shows its address; of KFP's own store too, which is called minio there."""
    from trimtab.store.s3 import S3Back

    made = source.fetch(str(zeros), open_store(str(tmp_path / "other")))
    artifact = SimpleNamespace(path=str(tmp_path / "export"), metadata={})
    stages.describe_tree(artifact, made)
    address = artifact.path
    if scheme:
        for name, value in s3_server.environment.items():
            monkeypatch.setenv(name, value)
        S3Back(s3_server.bucket, "").write("v2/artifacts/export", Path(artifact.path).read_bytes())
        address = f"{scheme}{s3_server.bucket}/v2/artifacts/export"
    assert source.check(address) == address
    assert source.fetch(address, store).digest == made.digest


PREFIXES = ["my models/llama 3", "team+a/c++", "modèles/été", "模型"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_s3_is_taken_character_by_character(prefix, zeros, store, monkeypatch):
    class Bucket:
        """Stands in for the bucket: gives the model's files to whoever asks for this prefix."""

        def __init__(self, bucket: str, asked: str):
            assert bucket == "bucket" and asked in ("", prefix)

        def read(self, key: str) -> None:
            assert key == prefix, "there is no object of that very name"

        def download(self, folder: Path, suffixes: tuple[str, ...], without: list[str]) -> None:
            shutil.copytree(zeros, folder, dirs_exist_ok=True)

    monkeypatch.setattr(source, "S3Back", Bucket)
    address = f"s3://bucket/{prefix}"
    assert source.check(address) == address
    assert source.fetch(address, store).bytes > 0


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_a_real_server(prefix, zeros, store, s3_server, monkeypatch):
    from trimtab.store.s3 import S3Back

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    back = S3Back(s3_server.bucket, prefix)
    for path in zeros.iterdir():
        back.write(path.name, path.read_bytes())
    back.write("consolidated.safetensors", b"Mistral's own form")
    assert source.fetch(f"s3://{s3_server.bucket}/{prefix}", store).digest == source.fetch(str(zeros), store).digest


CARD = "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: https://example.org/l\ntags: [a]\n---\n# A model\n"


def test_a_licence_travels_with_the_model(zeros, store, tmp_path):
    silent = source.fetch(str(zeros), store)
    assert LICENCE not in store.manifest(silent).metadata
    (zeros / "README.md").write_text(CARD)
    tree = source.fetch(str(zeros), store)
    known = {"id": "other", "name": "llama3.1", "link": "https://example.org/l"}
    assert store.manifest(tree).metadata[LICENCE] == known and "README.md" not in names(store, tree)
    other = open_store(str(tmp_path / "other"))
    assert other.manifest(source.fetch(tree.uri, other)).metadata[LICENCE] == known


@pytest.mark.parametrize("address", ["s3://", "s3://B/x", "s3://bucket/a//b", "s3://bucket/../b"])
def test_what_is_no_address_of_s3_is_refused_at_once(address):
    with pytest.raises(InputError, match="write s3://bucket/prefix"):
        source.check(address)


def write_gguf(path: Path, parts: int = 1) -> list[Path]:
    """Writes a tiny Llama of random weights as llama.cpp does, in one file or, as gguf-split does, in several."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.attn_{p}.weight": (HIDDEN, HIDDEN) for p in ("q", "k", "v", "output")}
        shapes |= {f"blk.{n}.ffn_{p}.weight": (2 * HIDDEN, HIDDEN) for p in ("gate", "up")}
        shapes[f"blk.{n}.ffn_down.weight"] = (HIDDEN, 2 * HIDDEN)
        shapes |= {f"blk.{n}.{p}_norm.weight": (HIDDEN,) for p in ("attn", "ffn")}
    tensors = [(name, torch.randn(shape, generator=draw).numpy()) for name, shape in shapes.items()]
    each = -(-len(tensors) // parts)
    written = []
    for number in range(parts):
        file = path if parts == 1 else path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}{path.suffix}")
        writer = GGUFWriter(file, "llama")
        if number == 0:
            describe(writer)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        for name, values in tensors[number * each : (number + 1) * each]:
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.append(file)
    return written


def describe(writer: GGUFWriter) -> None:
    """The metadata of the tiny Llama, with a tokenizer of bytes."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    merged = [f"{tokens[40]}{tokens[41]}", f"{tokens[42]}{tokens[43]}"]
    tokens += merged
    tokens += [f"<{number}>" for number in range(VOCABULARY - len(tokens))]
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([f"{tokens[40]} {tokens[41]}", f"{tokens[42]} {tokens[43]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one lower-case file becomes."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "out").mkdir()
    gguf.convert([str(write_gguf(folder / "tiny.gguf")[0])], str(folder / "out"))
    return folder / "out"


def test_the_licence_in_a_gguf_is_kept(converted):
    assert licence_of(converted) == {"id": "apache-2.0"}


@pytest.mark.parametrize(("name", "parts"), [("Tiny.GGUF", 1), ("tiny.gguf", 3), ("TINY-Q8.GGUF", 2)])
def test_gguf_of_any_case_and_in_parts_is_the_same_model(name, parts, converted, tmp_path):
    (tmp_path / "out").mkdir()
    paths = write_gguf(tmp_path / name, parts)
    for asked in paths:  # whichever part is given
        assert source.gguf_parts(asked) == paths
        assert source.check(str(asked)) == str(asked)
    gguf.convert([str(path) for path in paths], str(tmp_path / "out"))
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (converted / "tokenizer.json").read_text()
    assert source.facts(str(tmp_path / "out")).vocab_size == VOCABULARY


def test_a_missing_part_is_named_at_once(tmp_path):
    paths = write_gguf(tmp_path / "tiny.gguf", parts=3)
    paths[1].unlink()
    with pytest.raises(InputError, match="tiny-00002-of-00003.gguf is missing"):
        source.check(str(paths[0]))


def test_transformers_parses_a_gguf_once(tmp_path, monkeypatch):
    readers = []

    class Counted(GGUFReader):
        def __init__(self, *arguments):
            readers.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("gguf.GGUFReader", Counted)
    (tmp_path / "out").mkdir()
    gguf.convert([str(path) for path in write_gguf(tmp_path / "tiny.gguf")], str(tmp_path / "out"))
    assert len(readers) == 1


def test_gguf_is_converted_once(tmp_path, store):
    paths = write_gguf(tmp_path / "Tiny.GGUF", parts=2)
    tree = source.fetch(str(paths[0]), store)
    assert names(store, tree)[:2] == ["config.json", "generation_config.json"]
    assert source.fetch(str(paths[1]), store) == tree


@pytest.mark.parametrize(("status", "kind"), [(503, Transient), (429, Transient), (404, InputError), (401, InputError)])
def test_a_hub_that_is_busy_is_not_one_that_refuses(status, kind, monkeypatch):
    """The former is asked again, in a pod; the latter says what to change."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    answer = httpx.Response(status, request=httpx.Request("GET", "https://hub/org/name"))

    def refuse(*given, **named):
        raise HfHubHTTPError(f"{status} Error", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match="be had from the Hugging Face hub"):
        source._download_from_hub("org/name", Path("folder"))


def test_the_model_artifact_of_an_earlier_run(zeros, store, tmp_path):
    """What a task of it showed of its tree: an export is the next run's model."""
    tree = source.fetch(str(zeros), store)
    (tmp_path / "artifact").write_text(tree.to_json())
    assert source.fetch(str(tmp_path / "artifact"), store).digest == tree.digest


def test_the_model_artifact_of_an_earlier_run_in_s3(zeros, store, tmp_path, s3_server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    tree = source.fetch(str(zeros), store)
    place = "v2/artifacts/optimize/run/quantize/salt/export"
    source.S3Back(s3_server.bucket, "").write(place, tree.to_json().encode())
    assert source.fetch(f"s3://{s3_server.bucket}/{place}", store).digest == tree.digest
