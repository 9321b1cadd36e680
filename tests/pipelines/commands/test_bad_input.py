"""What bad input gets: one sentence that names the field and the remedy, exit code 2, nothing in the store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from trimtab.pipelines import api
from trimtab.pipelines.commands import main

GOOD_RECIPE = "quantize: {format: int8_wo}\n"


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of zeros, in which no process may need torch."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRIMTAB_PROGRESS", "TRIMTAB_RUN_PID"):
        monkeypatch.setenv(name, "")
    write_model(tmp_path / "model")
    return tmp_path


def trimtab(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Runs the command and returns its exit code and what it says to people, on one line."""
    code = main.main(["run", *options])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, " ".join(said.split())


def visible(store: Path) -> list[Path]:
    """What can be seen in a store beyond the model itself."""
    trees = [path for path in store.glob("trees/*.json") if json.loads(path.read_text())["kind"] != "checkpoint"]
    return [*trees, *store.glob("index/*"), *store.glob("releases/*"), *store.glob(".partial/*")]


OPTIONS = [
    (["--goal", "lower_latencies"], "goal: 'lower_latencies' is not valid; write 'lower_latency'"),
    (["--target", "a100"], "target: 'a100' is not known; write 'a100-40' or 'a100-80'"),
    (["--target", "h1000"], "target: 'h1000' is not known; write 'h100'"),
    (["--max-attempts", "0"], "max_attempts: 0 is not valid; write 1 to 10"),
    (["--max-attempts", "11"], "max_attempts: 11 is not valid; write 1 to 10"),
    (["--max-attempts", "many"], "argument --max-attempts: invalid int value: 'many'"),
    (["--recipe", "no-such.yaml"], "recipe: 'no-such.yaml' cannot be read (FileNotFoundError); write a YAML file"),
    (["--evaluation", "no-such.yaml"], "evaluation: 'no-such.yaml' cannot be read"),
    (["--task-path", "no-such", "--tasks", "x"], "no-such' is not a folder"),
    (["--tasks", " ,"], "--tasks: names no task; write names separated by commas, such as trimtab_suite"),
    (["--store", "gs://bucket/x"], "'gs://bucket/x' is not valid: write s3://bucket/prefix"),
    (["--store", "s3://B/x"], "'s3://B/x' is not valid: write s3://bucket/prefix"),
    (["--store", "model/config.json"], "is not a folder: choose another path"),
    (["--runs", "at/python3/runs"], "contains 'python3', which kfp.local replaces; use another path"),
    (["--name", "../x"], "the release name '../x' is not valid: write letters, digits, '.', '_', '-' of ASCII"),
    (["--name", "mo dèl"], "the release name 'mo dèl' is not valid"),
    (["--tasks", ""], "--tasks: names no task; write names separated by commas"),
    (["--tasks", " ,"], "--tasks: names no task"),
    (["--modle", "x"], "unrecognized arguments: --modle x; see trimtab --help"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(options) for options, _ in OPTIONS])
def test_options(options, message, folder, capsys):
    code, said = trimtab(capsys, "--model", "model", *options)
    assert (code, message in said) == (2, True), said
    assert visible(folder / "trimtab-store") == []


RECIPES = [
    ("quantise: {format: fp8}", "quantise: unknown key 'quantise'; write 'quantize'"),
    ("quantize: {fromat: fp8}", "quantize.fromat: unknown key 'fromat'; write 'format'"),
    ("quantize: {format: fp9}", "quantize.format: 'fp9' is not valid; write 'fp8'"),
    ("quantize: {format: int4_qptq}", "quantize.format: 'int4_qptq' is not valid; write 'int4_gptq'"),
    ("quantize: {format: fp8, scale_search: mean}", "quantize.scale_search: 'mean' is not valid; write 'mse'"),
    ("quantize: {format: fp8, effective_bits: 6}", "has effective_bits, which only format 'mixed' has; remove it"),
    ("quantize: {format: mixed}", "has format 'mixed' and no effective_bits; write effective_bits: 4 to 8"),
    ("calibrate: {text: empty.txt}", "calibrate.text: 'empty.txt' is empty; write the path of a file with text in it"),
    ("calibrate: {text: no.txt}", "calibrate.text: 'no.txt' is not a file; write 'builtin' or the path of a .txt"),
    ("distill: {tokens: 9, text: empty.txt}",
     "distill.text: 'empty.txt' is empty; write the path of a file with text in it"),
    ("distill: {tokens: 9, text: [builtin, no.jsonl]}", "distill.text: 'no.jsonl' is not a file; write 'builtin'"),
    ("quantize: [", "the recipe is not valid YAML or JSON"),
]


@pytest.mark.parametrize(("recipe", "message"), RECIPES)
def test_recipes(recipe, message, folder, capsys):
    (folder / "empty.txt").write_text(" \n")
    (folder / "recipe.yaml").write_text(recipe)
    code, said = trimtab(capsys, "--model", "model", "--recipe", "recipe.yaml")
    assert (code, message in said) == (2, True), said
    assert not (folder / "trimtab-store").exists()


ENDINGS = "*.down_proj, *.gate_proj, *.k_proj, *.o_proj, *.q_proj, *.up_proj, *.v_proj, lm_head"
PLANNED = [
    ("quantize: {format: fp8}", "a100-40", "fp8 needs compute capability 8.9 or later (Ada, Hopper, Blackwell)"),
    ("{quantize: {format: nvfp4}, engine: {backend: trtllm}}", "h100",
     "quantize.format: trtllm does not serve nvfp4 on h100; write one of: fp32, fp16, bf16, fp8, fp8_gptq, fp8_per_"),
    ("quantize: {format: int4_rtn, group_size: 128}", "cpu",
     "quantize.group_size: 128 does not divide the 64 input features of model.layers.0.mlp.gate_proj; write one of: "
     "64, 32"),
    ("quantize: {format: int8_wo, exclude: ['*.down_project']}", "cpu",
     f"quantize.exclude: '*.down_project' matches no layer; write '*.down_proj' (valid: {ENDINGS})"),
    ("quantize: {format: int8_wo, exclude: [model.layers.4.mlp.up_proj]}", "cpu",
     f"quantize.exclude: 'model.layers.4.mlp.up_proj' matches no layer; write 'model.layers.3.mlp.up_proj' (valid: "
     f"{ENDINGS})"),
    ("quantize: {format: int8_wo, exclude: [visual]}", "cpu",
     f"quantize.exclude: 'visual' matches no layer; valid: {ENDINGS}"),
    ("quantize: {format: int8_wo, exclude: ['*']}", "cpu",
     "quantize.exclude: leaves no layer to quantize; remove a pattern, or write format: bf16"),
    ("quantize: {format: int8_wo, exclude_sensitive: 16}", "cpu",
     "quantize.exclude_sensitive: 16 of 16 groups of layers leave nothing to quantize; write at most 15"),
    ("{prune: {method: depth, blocks: 3}, quantize: {format: int8_wo, exclude_sensitive: 5}}", "cpu",
     "quantize.exclude_sensitive: 5 of 4 groups of layers leave nothing to quantize; write at most 3"),
    ("prune: {method: wanda, pattern: '1:3'}", "cpu",
     "prune.pattern: 1:3 wants input features in groups of 3, which do not divide the 128 of "
     "model.layers.0.mlp.down_proj; write 'unstructured'"),
    ("prune: {method: depth, blocks: 9}", "cpu", "prune.blocks: 9 of 4 blocks cannot be removed; write at most 3"),
    ("prune: {method: width, kv_groups: 4}", "cpu",
     "prune.kv_groups: 4 of 4 KV groups cannot be removed; write at most 3"),
    ("prune: {method: width, hidden: 0.5}", "cpu",
     "prune.hidden: channels are kept in multiples of 64, and the model has 64; remove it"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(("recipe", "target", "message"), PLANNED)
def test_recipes_that_do_not_suit_model_or_target(command, recipe, target, message, folder, capsys):
    (folder / "recipe.yaml").write_text(recipe)
    code = main.main([command, "--model", "model", "--recipe", "recipe.yaml", "--target", target])
    said = " ".join(capsys.readouterr().err.split())
    assert (code, message in said) == (2, True), said
    assert not (folder / "trimtab-store").exists() and not (folder / "trimtab-runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quantize: {format: int8_wo, exclude: ['*.down']}", PLANNED[0][0]])
def test_the_plan_refuses_what_the_command_could_not_see(recipe, folder, capsys, monkeypatch):
    """As with a model that must be fetched first: the run ends there, before any work."""
    monkeypatch.setattr(api, "_outline", lambda *_: {})
    (folder / "recipe.yaml").write_text(recipe)
    code, said = trimtab(capsys, "--model", "model", "--recipe", "recipe.yaml", "--target", "a100-40")
    assert code == 2 and "trimtab: quantize." in said
    assert visible(folder / "trimtab-store") == []


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def git_lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def code_of_its_own(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))


def missing(model: Path) -> None:
    shutil.rmtree(model)


MODELS = [
    (without_weights, "holds no weights; add model.safetensors"),
    (truncated, "is cut short"),
    (pickle_only, "pytorch_model.bin is a pickle, which can run code when it is loaded, and is refused"),
    (git_lfs_pointer, "is a git-LFS pointer of"),
    (without_config, "has no config.json"),
    (without_tokenizer, "has no tokenizer.json"),
    (code_of_its_own, "needs remote code (auto_map), which trimtab never runs"),
    (missing, "model: 'model' does not exist; write a folder with config.json"),
]


@pytest.mark.parametrize(("damage", "message"), MODELS, ids=[damage.__name__ for damage, _ in MODELS])
def test_models(damage, message, folder, capsys):
    damage(folder / "model")
    code, said = trimtab(capsys, "--model", "model")
    assert (code, message in said) == (2, True), said
    assert visible(folder / "trimtab-store") == []


@pytest.mark.parametrize("model", ["./nope", "../nope", "~/nope", "/nope", "./nope.gguf"])
def test_a_path_is_never_asked_of_the_hub(model, folder, capsys):
    code, said = trimtab(capsys, "--model", model)
    assert (code, f"model: '{model}' does not exist; write a folder" in said) == (2, True), said
    assert not (folder / "trimtab-store").exists()


EVALUATIONS = [
    ("{tasks: [trimtab_plurals]}", ["--tasks", "trimtab_suite"], "--tasks: 'evaluation.yaml' has 'tasks' too; name"),
    ("{task_path: tasks}", ["--task-path", "others"], "--task-path: 'evaluation.yaml' has 'task_path' too; name"),
    ("{tasks: []}", [], "tasks: [] "),
    ("{items: [10, 10, 10]}", [], "items: 30 in all are too few"),
    ("{confirm_windows: 0}", [], "confirm_windows: 0 is too few"),
    ("{heldout: no-such.txt}", [], "heldout: 'no-such.txt' is not a file"),
    ("{tasks: trimtab_suite}", [], "tasks: 'trimtab_suite' is not a list; write [trimtab_suite]"),
]


@pytest.mark.parametrize(("evaluation", "options", "message"), EVALUATIONS, ids=[text for text, *_ in EVALUATIONS])
def test_evaluations(evaluation, options, message, folder, capsys):
    (folder / "evaluation.yaml").write_text(evaluation)
    code, said = trimtab(capsys, "--model", "model", "--evaluation", "evaluation.yaml", *options)
    assert (code, message in said) == (2, True), said
    assert visible(folder / "trimtab-store") == []


@pytest.mark.slow
def test_a_task_that_is_too_small_is_refused_with_the_number_that_would_do(folder, capsys):
    """It is lm-eval that knows how many items there are."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "x.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n' * 100)
    yaml = tiny._YAML.format(name=tiny.TASK, data=folder / "tasks" / "x.jsonl")
    (folder / "tasks" / "x.yaml").write_text(yaml)
    code, said = trimtab(capsys, "--model", "model", "--tasks", tiny.TASK, "--task-path", "tasks")
    assert code == 2 and f"tasks: {tiny.TASK} has 100 items for the looks and the confirmation together" in said
    assert "with fewer than 212 even an unchanged model could not be shown to keep 0.95" in said
    assert visible(folder / "trimtab-store") == []


@pytest.mark.slow
def test_hub_id_without_a_network(folder, capsys):
    code, said = trimtab(capsys, "--model", "no-such-org/no-such-model")
    assert code == 2 and "cannot be had from the Hugging Face hub" in said
    assert visible(folder / "trimtab-store") == []


@pytest.mark.slow
def test_a_task_by_another_name(folder, capsys, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "x.jsonl").write_text("{}\n")
    yaml = tiny._YAML.format(name=tiny.TASK, data=tmp_path / "tasks" / "x.jsonl")
    (tmp_path / "tasks" / "x.yaml").write_text(yaml)
    code, said = trimtab(capsys, "--model", "model", "--tasks", f"{tiny.TASK}s", "--task-path", "tasks")
    assert code == 2 and f"tasks: there is no task '{tiny.TASK}s'; write '{tiny.TASK}'" in said
    assert not (folder / "trimtab-store").exists()


def refusing(environment: dict[str, str], bucket: str) -> tuple[dict[str, str], str]:
    return {**environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, bucket


def wrong_secret(environment: dict[str, str], bucket: str) -> tuple[dict[str, str], str]:
    return {**environment, "AWS_SECRET_ACCESS_KEY": "no-such-secret"}, bucket


def wrong_key(environment: dict[str, str], bucket: str) -> tuple[dict[str, str], str]:
    return {**environment, "AWS_ACCESS_KEY_ID": "nobody"}, bucket


def missing_bucket(environment: dict[str, str], bucket: str) -> tuple[dict[str, str], str]:
    return environment, "no-such-bucket"


def no_credentials(environment: dict[str, str], bucket: str) -> tuple[dict[str, str], str]:
    return {**environment, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, bucket


S3 = [
    (refusing, "refuses the connection: start it or correct AWS_ENDPOINT_URL"),
    (wrong_secret, "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: correct it"),
    (wrong_key, "AWS_ACCESS_KEY_ID is not known there: correct it"),
    (missing_bucket, "the bucket 'no-such-bucket' does not exist: create it or correct the store's address"),
    (no_credentials, "AWS_ACCESS_KEY_ID"),
]


@pytest.mark.parametrize(("damage", "message"), S3, ids=[damage.__name__ for damage, _ in S3])
def test_s3(damage, message, folder, capsys, monkeypatch, s3_server):
    environment, bucket = damage(dict(s3_server.environment), s3_server.bucket)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, said = trimtab(capsys, "--model", "model", "--store", f"s3://{bucket}/x")
    assert (code, message in said) == (2, True), said
    assert environment["AWS_SECRET_ACCESS_KEY"] == "" or environment["AWS_SECRET_ACCESS_KEY"] not in said


@pytest.mark.slow
def test_full_disk(folder):
    """No file may grow beyond 64 kB: the model does not fit into the store."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from trimtab.pipelines.commands.main import main; "
        "sys.exit(main(['run', '--model', 'model', '--max-attempts', '1']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    said = " ".join(run.stderr.split())
    assert run.returncode == 4, said
    assert "trimtab: no space left at the store" in said and "Traceback" not in said
    assert list((folder / "trimtab-store").glob("trees/*")) == [] and visible(folder / "trimtab-store") == []
