"""The evaluation suite: its items are sound, its files are reproducible, and lm-eval can load them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from trimtab.components.validation.suite import generate

FOLDER = Path(generate.__file__).resolve().parent
TASKS = list(generate.BUILDERS)
MINIMAL_PAIRS = ("subject_verb_agreement", "pronoun_agreement")


def items_of(task: str) -> list[dict]:
    """Return the committed items of a task."""
    return [json.loads(line) for line in (FOLDER / "data" / f"{task}.jsonl").read_text("utf-8").splitlines()]


def test_size():
    """The suite is large enough, and its tasks are balanced."""
    assert 8 <= len(TASKS) <= 10
    counts = [len(items_of(task)) for task in TASKS]
    assert all(500 <= count <= 650 for count in counts)
    assert sum(counts) >= 4800


def test_files_match_the_tasks():
    """There are a data file, a fact file and a task file for every task, and no others."""
    assert {path.stem for path in (FOLDER / "data").iterdir()} == set(TASKS)
    assert {path.stem for path in (FOLDER / "facts").iterdir()} == set(TASKS)
    assert {path.stem for path in FOLDER.glob("trimtab_*.yaml")} == {
        "trimtab_suite",
        *(f"trimtab_{task}" for task in TASKS),
    }


def test_generation_reproduces_the_data(tmp_path):
    """The committed data files are what the generator writes, byte for byte."""
    assert generate.main(["--output", str(tmp_path)]) == 0
    for task in TASKS:
        name = f"{task}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes(), name


@pytest.mark.parametrize("task", TASKS)
def test_items_are_well_formed(task):
    """Every item has an id of its own, distinct choices, a valid answer and few words."""
    items = items_of(task)
    assert [item["id"] for item in items] == [f"{task}-{n:04d}" for n in range(1, len(items) + 1)]
    for item in items:
        assert set(item) == {"id", "context", "choices", "answer"}
        choices = item["choices"]
        assert 2 <= len(choices) <= 4
        assert len(set(choices)) == len(choices)
        assert 0 <= item["answer"] < len(choices)
        text = item["context"] + "".join(choices)
        assert text.isascii()
        assert "{" not in text and "  " not in text
        # What YAML makes of an unquoted "on" or "null".
        assert not {"True", "False", "None"} & set(text.replace(",", " ").split())
        assert all(len((item["context"] + choice).split()) <= 20 for choice in choices)


@pytest.mark.parametrize("task", TASKS)
def test_items_are_unique(task):
    """No item occurs twice, whatever the order of its choices."""
    items = items_of(task)
    assert len({(item["context"], frozenset(item["choices"])) for item in items}) == len(items)
    assert len({(item["context"], item["choices"][item["answer"]]) for item in items}) == len(items)


@pytest.mark.parametrize("task", TASKS)
def test_no_right_answer_is_a_distractor(task):
    """What is right after a context in one item is not offered as wrong after the same context in another."""
    right: dict[str, set[str]] = {}
    for item in items_of(task):
        right.setdefault(item["context"], set()).add(item["choices"][item["answer"]])
    for item in items_of(task):
        wrong = {choice for index, choice in enumerate(item["choices"]) if index != item["answer"]}
        assert not wrong & right[item["context"]], item


@pytest.mark.parametrize("task", TASKS)
def test_answer_positions_are_uniform(task):
    """No position is right much more often than chance."""
    expected: Counter[int] = Counter()
    found: Counter[int] = Counter()
    for item in items_of(task):
        found[item["answer"]] += 1
        for position in range(len(item["choices"])):
            expected[position] += 1 / len(item["choices"])
    for position, count in expected.items():
        assert abs(found[position] - count) < 4 * count**0.5


@pytest.mark.parametrize("task", TASKS)
def test_form_of_contexts_and_choices(task):
    """Minimal pairs are whole sentences; other choices continue a context that does not end in a space."""
    for item in items_of(task):
        if task in MINIMAL_PAIRS:
            first, second = item["choices"]
            assert item["context"] == ""
            assert first[0].isupper() and second[0].isupper()
            assert first[-1] == second[-1] and first[-1] in ".?"
            words = zip(first.split(), second.split(), strict=True)
            assert sum(a != b for a, b in words) == 1, item
        else:
            assert item["context"] and not item["context"].endswith(" ")
            assert all(choice[0] == " " and choice[1] != " " for choice in item["choices"])


def test_lm_eval_loads_every_task(tmp_path, monkeypatch):
    """The group and its tasks load from any working directory and give back the committed items."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(tmp_path)
    manager = tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_tasks) == {"trimtab_suite", *(f"trimtab_{task}" for task in TASKS)}
    loaded = manager.load(["trimtab_suite"])["tasks"]
    for task in TASKS:
        configured = loaded[f"trimtab_{task}"]
        items = items_of(task)
        assert len(configured.eval_docs) == len(items)
        for doc, item in zip(configured.eval_docs, items, strict=True):
            assert doc == item
        for doc in list(configured.eval_docs)[:20]:
            assert configured.doc_to_text(doc) == doc["context"]
            assert configured.doc_to_choice(doc) == doc["choices"]
            assert configured.doc_to_target(doc) == doc["answer"]
            requests = configured.construct_requests(doc=doc, ctx=doc["context"])
            assert [request.args for request in requests] == [(doc["context"], c) for c in doc["choices"]]
    assert not list(tmp_path.iterdir())
