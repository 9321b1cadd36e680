"""What is rewritten keeps its meaning: config.json as transformers reads it after 5 and before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from trimtab.runtime.checkpoint import config_file

#: Llama 3.1's own.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
#: A model type, its config as transformers 5 saves it, and the fields that transformers 4 reads of it.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama 2": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 10000.0, "rope_scaling": None},
    ),
    "Llama 3.1": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "Qwen 2.5 with YaRN": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                             "rope_theta": 1000000.0}},
        {"rope_theta": 1000000.0,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    "GLM-4": (
        "glm4",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "Gemma 3": (
        "gemma3_text",
        {"rope_parameters": GEMMA3, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
        {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "Phi-3 with LongRoPE": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", **LONGROPE, "rope_theta": 10000.0,
                             "original_max_position_embeddings": 4096}, "original_max_position_embeddings": 4096},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **LONGROPE}},
    ),
}  # fmt: skip


def document(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": kind, "architectures": ["X"], "dtype": "float16", **SIZES, **fields}


def meaning(folder: Path) -> dict[str, Any]:
    """What the installed transformers reads, without what it keeps and does not use."""
    found = AutoConfig.from_pretrained(folder).to_dict()
    found["rope_parameters"].pop("type", None)  # Phi-3's older name of rope_type, which stands beside it
    known = AutoConfig.for_model(found["model_type"]).to_dict()
    return {name: value for name, value in found.items() if name in known}


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_transformers_5_is_written_for_both(case, tmp_path):
    kind, fields, before = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(document(kind, fields)))
    expected = meaning(tmp_path)
    config_file.write(tmp_path, document(kind, fields))
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in before} == before
    assert (written["dtype"], written["torch_dtype"]) == ("float16", "float16")
    assert meaning(tmp_path) == expected


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_transformers_4_is_written_for_both(case, tmp_path):
    kind, fields, before = CASES[case]
    others = {name: value for name, value in fields.items() if name != "rope_parameters"}
    old = document(kind, {**others, **before, "torch_dtype": "float16"})
    del old["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    expected = meaning(tmp_path)
    config_file.write(tmp_path, old)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written.get(name) for name in before} == before
    rotary = expected["rope_parameters"]
    assert {name: written["rope_parameters"][name] for name in rotary} == rotary
    assert meaning(tmp_path) == expected
    config_file.write(tmp_path, written)  # once more changes nothing
    assert json.loads((tmp_path / "config.json").read_text()) == written


def test_only_what_was_changed_is_written_anew(tmp_path):
    """What transformers does not know, and what it leaves out as its default, stays."""
    source = document("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 16, "of_another": [1]})
    source["num_hidden_layers"] = 33
    (tmp_path / "config.json").write_text(json.dumps(source))
    config = config_file.read(tmp_path)
    config.num_hidden_layers = 32  # the class's default
    assert config_file.changed(tmp_path, config) == source | {"num_hidden_layers": 32}


def test_configs_inside_a_config_are_written_for_both(tmp_path):
    inside = {"model_type": "llama", "dtype": "bfloat16", **CASES["Llama 3.1"][1]}
    found = config_file.both_spellings({"model_type": "of_many_parts", "text_config": inside})
    assert found["text_config"]["torch_dtype"] == "bfloat16"
    assert found["text_config"]["rope_scaling"] == LLAMA3


def test_a_model_without_rotary_embeddings_gets_none():
    assert config_file.both_spellings({"model_type": "opt"}) == {"model_type": "opt"}


#: Wheels that are unpacked beside each other: transformers before 5, and the hub's library that it wants.
OLD = ("transformers==4.57.6", "huggingface_hub==0.36.0")
READ = """
import json, sys
from transformers import AutoConfig
found = [AutoConfig.from_pretrained(folder).to_dict() for folder in sys.argv[1:]]
print(json.dumps([{name: value for name, value in one.items() if name != "_name_or_path"} for one in found]))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import transformers 4.57 from."""
    folder = tmp_path_factory.mktemp("transformers-4")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "-d", str(folder), *OLD]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4.57 cannot be downloaded")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


def read_by(library: Path, folders: list[Path]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(library), "USE_TORCH": "0"}
    command = [sys.executable, "-c", READ, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_transformers_4_reads_what_it_read_before(transformers_4, tmp_path):
    """A source in its spelling, as it is and written anew."""
    pairs = []
    for number, (kind, fields, before) in enumerate(CASES.values()):
        source, written = tmp_path / f"{number}-source", tmp_path / f"{number}-written"
        others = {name: value for name, value in fields.items() if name != "rope_parameters"}
        for folder, content in ((source, {**others, **before}), (written, fields)):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(document(kind, content) | {"torch_dtype": "float16"}))
        config_file.write(written, json.loads((written / "config.json").read_text()))
        pairs += [source, written]
    found = read_by(transformers_4, pairs)
    for source, written in zip(found[::2], found[1::2], strict=True):
        assert source["transformers_version"].startswith("4.57")
        assert {name: written[name] for name in source} == source


@pytest.mark.slow
def test_transformers_4_reads_a_pruned_model(transformers_4, tmp_path):
    """Llama 3.1, a block shorter."""
    import tiny

    from trimtab.components.pruning.structured import writing
    from trimtab.components.pruning.structured.depth import without

    source, output = tiny.write_model(tmp_path / "source"), tmp_path / "output"
    content = json.loads((source / "config.json").read_text())
    content.pop("rope_parameters", None)
    content |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072}
    (source / "config.json").write_text(json.dumps(content))
    output.mkdir()
    writing.write(source, without(source, [0]), output, tmp_path / "scratch")
    old, new = read_by(transformers_4, [source, output])
    assert new.pop("num_hidden_layers") == old.pop("num_hidden_layers") - 1
    assert {name: new[name] for name in old} == old
