"""What is measured, from a file and from the options beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.pipelines.inputs import read_evaluation


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation.yaml").write_text("{tasks: [piqa, winogrande], task_path: mine, items: [1, 2, 3]}")
    return "evaluation.yaml"


def test_the_file_holds(file):
    """The default of an option is no option."""
    found = read_evaluation(file)
    assert found.tasks == ("piqa", "winogrande") and found.items == (1, 2, 3)
    assert found.task_path == "mine"


def test_options_add_to_it(tmp_path):
    (tmp_path / "evaluation.yaml").write_text("{items: [1, 2, 3]}")
    found = read_evaluation(str(tmp_path / "evaluation.yaml"), "piqa, boolq", "mine")
    assert (found.tasks, found.task_path) == (("piqa", "boolq"), "mine")
    assert found.items == (1, 2, 3)


def test_without_either_it_is_the_suite():
    assert read_evaluation("").tasks == ("trimtab_suite",) and read_evaluation("").task_path == ""
