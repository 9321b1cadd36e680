"""Every file of examples/ is what its first lines say, and is listed there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import links
import pytest
import yaml

from trimtab.loop import decisions
from trimtab.model import hardware
from trimtab.model.outline import outline as shapes_of
from trimtab.pipelines.commands import main
from trimtab.pipelines.documents import DOCUMENTS
from trimtab.planning import dealing, task_sizes
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation

EXAMPLES = links.ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
#: A word of a file's name, and the document that it is; any other is a recipe.
KINDS = {"workload": "workload", "evaluation": "evaluation", "profile": "profile", "rollout": "rollout"}


def kind(path: Path) -> str:
    return next((name for word, name in KINDS.items() if word in path.stem.split("-")), "recipe")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_valid(path, capsys):
    assert main.main([kind(path), "--check", str(path)]) == 0
    assert DOCUMENTS[kind(path)].parse(path.read_text()).to_dict()
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()


def command(path: Path) -> list[str]:
    """The command in the first lines of an example, as a shell would split it."""
    (found,) = re.findall(r"# (?:.*: )?trimtab (.*--\w[\w-]* examples/.*)", path.read_text()) or [""]
    return found.split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_command_is_one(path):
    words = command(path)
    if words:
        arguments = main.parser().parse_args(words)
        assert f"examples/{path.name}" in vars(arguments).values()


@pytest.mark.parametrize("path", [path for path in FILES if "--goal" in command(path)], ids=lambda path: path.stem)
def test_a_recipe_can_be_planned_for_its_goal_and_target(path):
    """For Llama 3.1 8B, by the file's own goal and target."""
    arguments = main.parser().parse_args(command(path))
    facts = shapes_of(links.ROOT / "tests/unit/configs/llama-3.1-8b.json")
    wanted = Recipe.parse(path.read_text())
    outline = decisions.outline(arguments.goal, facts, hardware.target(arguments.target), wanted)
    assert outline["rungs"][0]["title"]


def test_own_tasks_have_enough_items():
    evaluation = Evaluation.parse((EXAMPLES / "evaluation-own-tasks.yaml").read_text())
    task = yaml.safe_load((EXAMPLES / "tasks/capitals.yaml").read_text())
    lines = (links.ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    for item in map(json.loads, lines):
        assert 0 <= item["right"] < len(item["answers"]) == len(set(item["answers"]))
    sizes = {**task_sizes.of(Evaluation()), "capitals": len(lines)}
    dealing.deal(sizes, evaluation, Recipe().accept, 5)
