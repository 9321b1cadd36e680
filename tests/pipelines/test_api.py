"""`import trimtab`: light, typed, and the same functions that the command calls."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import trimtab
from trimtab.base.errors import InputError
from trimtab.pipelines import local
from trimtab.recipe import Engine, Recipe

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip  # Llama-3.1-8B's own


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def loaded(code: str) -> list[str]:
    """The heavy libraries that are loaded once this code has run in a fresh Python."""
    code = f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'kfp', 'modelopt') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_it_is_light():
    assert loaded("import trimtab") == []
    assert loaded("import trimtab\nfor name in trimtab.__all__: getattr(trimtab, name)") == []
    assert loaded("from trimtab import *\nassert Recipe.parse('{}') == Recipe()") == []


def test_planning_is_light(config):
    assert loaded(f"import trimtab\nassert trimtab.plan({str(config)!r}, target='h100')['rungs']") == []


def test_what_runs_is_what_type_checkers_read():
    tree = ast.parse(Path(trimtab.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == trimtab._FROM and list(read) and sorted(read) == trimtab.__all__
    for name, module in read.items():
        assert getattr(trimtab, name) is getattr(sys.modules[module], name)
    assert set(trimtab.__all__) <= set(dir(trimtab)) and resources.files("trimtab").joinpath("py.typed").is_file()


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        trimtab.optimise  # noqa: B018
    from trimtab import families  # a room is still found

    assert families.of


def test_plan_is_the_function_when_its_room_was_imported_too():
    code = "import trimtab.planning.matrix\nfrom trimtab import plan\nassert callable(plan) and callable(trimtab.plan)"
    assert loaded(code) == []


def test_a_recipe_in_each_form_makes_the_same_plan(config, tmp_path):
    text = "{quantize: {format: int8_wo}, engine: {backend: torch}}"
    (tmp_path / "recipe.yaml").write_text(text)
    forms = [
        text,
        {"quantize": {"format": "int8_wo"}, "engine": {"backend": "torch"}},
        tmp_path / "recipe.yaml",
        Recipe(quantize={"format": "int8_wo"}, engine=Engine(backend="torch")),  # its default, but named
    ]
    first, *others = [trimtab.plan(config, target="h100", goal="lower_latency", recipe=form) for form in forms]
    assert first["rungs"][0]["recipe"]["quantize"]["format"] == "int8_wo"
    assert first["baseline"]["placement"]["backend"] == "torch" and all(other == first for other in others)



@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"goal": "faster"}, "goal: 'faster' is not valid"),
        ({"target": "h1000"}, "target: 'h1000' is not known; write 'h100'"),
        ({"recipe": {"quantise": {}}}, "quantise: unknown key 'quantise'; write 'quantize'"),
        ({"recipe": Path("none.yaml")}, "recipe: 'none.yaml' cannot be read"),
        ({"recipe": {"calibrate": {"text": "none.txt"}}}, "calibrate.text: 'none.txt' is not a file"),
        ({"evaluation": {"tasks": ["qqqqqq", "trimtab_suite"]}},
         "tasks: there is no task 'qqqqqq'; trimtab's own are trimtab_"),
        ({"evaluation": {"heldout": "none.txt"}}, "heldout: 'none.txt' is not a file"),
        ({"max_attempts": 11}, "max_attempts: 11 is not valid"),
        ({"name": "../x"}, "the release name '../x' is not valid"),
    ],
)
def test_plan_and_run_refuse_the_same(wrong, message, config, tmp_path):
    for function in (trimtab.plan, trimtab.run):
        with pytest.raises(InputError) as refused:
            function(config, **wrong)
        assert message in str(refused.value)
    assert not (tmp_path / "trimtab-store").exists()


def test_run_hands_the_pipeline_what_was_asked(write_model, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(local, "run", lambda parameters, folder, console, **_: given.update(parameters, folder=folder))
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model")
    evaluation = "{items: [400, 0, 0], task_path: mine}"
    trimtab.run("model", "store", recipe={"quantize": {"format": "int8_wo"}}, evaluation=evaluation)
    assert given["model"] == str(model) and given["store"] == (tmp_path / "store").as_uri() and given["name"] == "model"
    assert given["folder"] == tmp_path / "trimtab-runs" and given["max_attempts"] == 5
    assert json.loads(given["evaluation"]) == {"items": [400, 0, 0], "task_path": str(tmp_path / "mine")}
    assert Recipe.parse(given["recipe"]) == Recipe.parse("{quantize: {format: int8_wo}}")


def test_a_signature_is_asked_for_one_run_alone(config, monkeypatch):
    from trimtab.base import signing

    monkeypatch.delenv(signing.REQUIRED, raising=False)
    monkeypatch.delenv(signing.KEY, raising=False)
    with pytest.raises(InputError, match="is not set, and releases must be signed"):
        trimtab.run(config, require_signature=True)
    assert not signing.is_required()


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "trimtab"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"trimtab {trimtab.__version__}\n"
    wrong = subprocess.run([*command, "recipe", "--check", "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "recipe: 'none.yaml' cannot be read" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trimtab v", {"verify "}),
        ("trimtab run --goal lower_l", {"lower_latency "}),
        ("trimtab profile --e", {"--example "}),
    ],
)
def test_a_shell_completes_the_command(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"), "_ARGCOMPLETE_IFS": "|"}
    environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    subprocess.run([sys.executable, "-m", "trimtab"], env=environment, check=True)
    assert set((tmp_path / "said").read_text().split("|")) == expected
