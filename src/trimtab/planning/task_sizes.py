"""What the tasks of an evaluation are like: how many items each has, and which let a model write."""

from __future__ import annotations

from importlib import resources

from trimtab.base import child
from trimtab.recipe.evaluation import Evaluation

_SUITE = "trimtab.components.validation.suite"
_ALL = "trimtab_suite"


def of(evaluation: Evaluation) -> dict[str, int]:
    """Returns the number of items of each task, groups resolved into their members.

    trimtab's own tasks are counted here; any others are read by lm-eval in a child process, which may download them.

    Raises:
        InputError: a task that does not exist, scores no single items or has no such filter; names what to write.
        StageError: the data of a task cannot be read.
    """
    if own := of_own(evaluation):
        return own
    measured = child.call(
        "trimtab.components.validation.evaluation.tasks:sizes",
        names=list(evaluation.tasks),
        task_path=evaluation.task_path,
        filters=dict(evaluation.filters),
    )
    return measured.value


def writing(evaluation: Evaluation) -> list[str]:
    """Returns the tasks that let a model write, instead of asking how likely given answers are; errors as `of`."""
    if of_own(evaluation):
        return []
    work = "trimtab.components.validation.evaluation.tasks:writing"
    return child.call(work, names=list(evaluation.tasks), task_path=evaluation.task_path).value


def of_own(evaluation: Evaluation) -> dict[str, int]:
    """Returns the number of items of each task where all are trimtab's own, which takes no time, otherwise {}."""
    own, asked = _own(), set(evaluation.tasks)
    if evaluation.filters or not asked <= {_ALL, *own}:
        return {}
    return {task: size for task, size in own.items() if {_ALL, task} & asked}


def _own() -> dict[str, int]:
    """An item is a line of the file that is called as its task."""
    files = resources.files(_SUITE).joinpath("data").iterdir()
    return {
        f"trimtab_{file.name.removesuffix('.jsonl')}": len(file.read_text(encoding="utf-8").splitlines())
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".jsonl")
    }
