"""The command `plan`: for people and for scripts, of every kind of model that `run` takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter

from trimtab.components.fetch import source
from trimtab.pipelines.commands import main
from trimtab.store import open_store

#: Llama-3.1-8B's own.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a bare config.json, beside another file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main.main(["plan", *options])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, " ".join(said.err.split())


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    code, out, said = plan(capsys, *options, "--json")
    assert code == 0, said
    return json.loads(out)


def test_for_scripts(config, capsys):
    found = planned(capsys, "--model", config, "--target", "l4", "--goal", "lower_latency")
    assert (found["goal"], found["target"]) == ("lower_latency", "l4")
    assert found["baseline"]["placement"]["devices"] == 1 and "l4" in found["baseline"]["why"]
    assert found["rungs"][0]["recipe"]["quantize"]["format"] == "fp8" and found["rungs"][0]["why"]
    assert {"title", "why"} <= set(found["refused"][0])
    needed = found["rungs"][0]["resources"]
    assert list(needed) == ["calibrate", "recalibrate", "quantize", "engine", "validate"]
    assert needed["calibrate"]["gpus"] == 1 and 1e9 < needed["calibrate"]["gpu_bytes"] < 80e9
    assert list(found["baseline"]["resources"]) == ["engine", "validate"]


def test_for_people(config, capsys):
    code, out, _ = plan(capsys, "--model", config, "--target", "l4", "--goal", "lower_latency")
    assert code == 0 and "lower_latency on l4, trtllm" in out and "baseline" in out and "not tried: " in out
    assert "what each stage needs" in out and "recalibrate" in out and "1 x " in out and " min" in out


REFUSED = [
    (["--target", "a100-40", "--recipe", "fp8.yaml"], "fp8 needs compute capability 8.9 or later"),
    (["--target", "H100-SXM"], "target: 'H100-SXM' is not known; write 'h100'"),
    (["--name", "../x"], "the release name '../x' is not valid"),
    (["--max-attempts", "11"], "max_attempts: 11 is not valid"),
    (["--model", "./nope"], "model: './nope' does not exist"),
    (["--evaluation", "small.yaml"], "items: 10 in all are too few"),
    (["--evaluation", "both.yaml", "--tasks", "trimtab_suite"], "--tasks: 'both.yaml' has 'tasks' too"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_refusal_ends_with_2_and_is_told_to_scripts_too(options, message, config, capsys):
    Path("fp8.yaml").write_text("quantize: {format: fp8}")
    Path("small.yaml").write_text("items: [5, 3, 2]")
    Path("both.yaml").write_text("tasks: [trimtab_suite]")
    code, out, said = plan(capsys, "--model", config, *options, "--json")
    found = json.loads(out)
    assert code == 2 and message in said and message in found["refused"][0]["why"]
    assert found["baseline"] is None and found["rungs"] == [] and not Path("trimtab-store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "w.yaml"], "workload: is for sizing an engine; add --engine, or write the workload into"),
        (["--gpus", "4"], "gpus: is for sizing an engine; add --engine"),
        (["--engine", "--json"], "json: is for the plan of a run; leave --engine or --json out"),
    ],
)
def test_options_that_belong_together(options, message, config, capsys):
    Path("w.yaml").write_text("concurrency: 4")
    code, _, said = plan(capsys, "--model", config, *options)
    assert (code, message in said) == (2, True), said


def test_it_takes_the_options_of_a_run(config, capsys):
    options = ["--max-attempts", "3", "--name", "a", "--tasks", "trimtab_suite", "--runs", "r", "--store", "s"]
    assert planned(capsys, "--model", config, *options)["rungs"]
    assert not Path("r").exists() and not Path("s").exists()


def gguf(path: Path) -> Path:
    """A file with the metadata of a small Llama and no tensors."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, 64), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 128), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_vocab_size, 64), (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_kind_of_model(config, capsys, write_model, tmp_path):
    folder = write_model(tmp_path / "model")
    store = open_store(str(tmp_path / "store"))
    tree = source.fetch(str(folder), store)
    (tmp_path / "bare").mkdir()
    shutil.copy(config, tmp_path / "bare")
    titles = {
        name: [rung["title"] for rung in planned(capsys, "--model", str(model))["rungs"]]
        for name, model in {"folder": folder, "tree": tree.uri, "bare": tmp_path / "bare", "config": config}.items()
    }
    assert titles["folder"] == titles["tree"] and titles["bare"] == titles["config"] and all(titles.values())


@pytest.mark.slow
def test_a_gguf_file(tmp_path, capsys):
    assert planned(capsys, "--model", str(gguf(tmp_path / "tiny.gguf")))["rungs"]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    code, _, said = plan(capsys, "--model", str(tmp_path / "bad.gguf"))
    assert code == 2 and "is no GGUF file of a model that transformers reads" in said


@pytest.mark.slow
def test_a_prefix_in_s3(config, capsys, s3_server, monkeypatch, tmp_path):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/models/big")
    store._back.write("config.json", Path(config).read_bytes())
    assert planned(capsys, "--model", f"s3://{s3_server.bucket}/models/big", "--target", "h100")["rungs"]
    code, _, said = plan(capsys, "--model", f"s3://{s3_server.bucket}/models/none")
    assert code == 2 and "has no config.json; write the prefix that holds the model's files" in said


def test_a_config_without_what_its_shapes_follow_from(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3_moe", "num_experts": None}))
    code, _, said = plan(capsys, "--model", "config.json")
    assert code == 2 and "num_experts must be a whole number above 0, got None" in said
