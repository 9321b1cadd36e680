"""What a run is made of, and how two runs differ in it."""

from __future__ import annotations

import pytest

from trimtab.loop.provenance import Provenance, differences, gather
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import Tree

MODEL = "3f" * 32


def made_of(**changes) -> Provenance:
    wanted = {
        "model": Tree(uri=f"s3://store/trees/{MODEL}", digest=MODEL),
        "recipe": Recipe(),
        "goal": "lower_latency",
        "target": "l40s",
        "max_attempts": 5,
        "evaluation": Evaluation(),
        "images": "registry/trimtab:1",
    }
    return gather(**{**wanted, **changes})


FP8 = Recipe.parse("quantize: {format: fp8}")
OTHER = Recipe.parse("accept: {min_recovery: 0.9}")

DIFFERENCES = {
    "nothing": ({}, {}),
    "base model": ({"model": Tree(uri="", digest="ab" * 32)}, {"model": ["model: 3f3f3f3f3f3f → abababababab"]}),
    "goal": ({"goal": "lower_cost"}, {"goal": ["goal: lower_latency → lower_cost"]}),
    "target": ({"target": "h100"}, {"target": ["target: l40s → h100"]}),
    "image": (
        {"images": "registry/trimtab:1 registry/cuda:2"},
        {"images": ["images: registry/trimtab:1 → registry/trimtab:1 registry/cuda:2"]},
    ),
    "attempts": ({"max_attempts": 6}, {"max_attempts": ["max_attempts: 5 → 6"]}),
    "recipe": (
        {"recipe": OTHER},
        {"recipe": ["recipe.accept.min_recovery: 0.95 → 0.9"]},
    ),
    "a new section of the recipe": (
        {"recipe": FP8},
        {"recipe": ["recipe.quantize: none → {'format': 'fp8', 'group_size': 64, 'effective_bits': None, …"]},
    ),
    "evaluation": (
        {"evaluation": Evaluation(confirm_items=10)},
        {"evaluation": ["evaluation.confirm_items: 960 → 10"]},
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(name):
    changes, said = DIFFERENCES[name]
    assert differences(made_of(), made_of(**changes)) == said


@pytest.mark.parametrize(
    ("field", "recipe", "evaluation"),
    [
        ("calibration_data", "calibrate: {text: FILE}", "{}"),
        ("distillation_data", "distill: {tokens: 99, text: [builtin, FILE]}", "{}"),
        ("measured_data", "{}", "heldout: FILE"),
        ("measured_data", "{}", "task_path: FOLDER"),
    ],
)
def test_an_edited_file_is_another_material(field, recipe, evaluation, tmp_path):
    file = tmp_path / "t.txt"

    def now() -> Provenance:
        texts = [t.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)) for t in (recipe, evaluation)]
        return made_of(recipe=Recipe.parse(texts[0]), evaluation=Evaluation.parse(texts[1]))

    file.write_text("one")
    before = now()
    assert differences(before, now()) == {}
    file.write_text("two")
    assert list(differences(before, now())) == [field]
    file.unlink()
    assert list(differences(before, now())) == [field], "a file that is gone"


def test_a_library_of_another_version():
    now = made_of()
    before = now.model_copy(update={"versions": {**now.versions, "torch": "1.0", "gone": "2"}})
    assert set(differences(before, now)) == {"versions"}
    assert "versions.gone: 2 → none" in differences(before, now)["versions"]


def test_read_as_it_was_written():
    there = made_of(recipe=OTHER)
    assert Provenance.parse(there.model_dump(mode="json")) == there
