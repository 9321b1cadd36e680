"""lm-eval tasks as one row of items, from which the looks draw ranges that never overlap."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from trimtab.errors import InputError, nearest

SUITE = Path(__file__).parent / "suite"


def load(names: list[str], task_path: str) -> tuple[TaskManager, dict[str, Any]]:
    """Returns lm-eval's task manager and the named tasks, groups resolved into their members.

    Args:
        names: tasks or groups of lm-eval, of trimtab's own suite, or of the folder `task_path`.
        task_path: a folder of task YAMLs, or "".

    Raises:
        InputError: a task or the folder does not exist; names the nearest that does.
    """
    if task_path and not Path(task_path).is_dir():
        raise InputError(f"task_path: '{task_path}' is not a folder")
    own = [str(SUITE)] + ([task_path] if task_path else [])
    manager = TaskManager(include_path=own, include_defaults=False)
    if not all(name in manager.all_tasks for name in names):
        manager = TaskManager(include_path=own)  # the thousands of tasks of lm-eval take seconds to list
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"tasks: there is no task '{name}'; {_near(name, manager)}")
    return manager, manager.load(list(names))["tasks"]


def _near(name: str, manager: TaskManager) -> str:
    own = sorted(task for task in manager.all_tasks if task.startswith("trimtab_"))
    hint = nearest(name, manager.all_tasks)
    return hint.split(" (valid")[0] if hint.startswith("write") else f"trimtab's own are {', '.join(own)}"


def choose(tasks: dict[str, Any], start: int, stop: int) -> dict[str, list[int]]:
    """Returns the documents of the items `start` to `stop`: task after task in turn, each in its own fixed order.

    The order of a task's documents is shuffled with its name as the seed, because many data sets are sorted,
    and a prefix must be a random sample. Tasks that have run out of documents are passed over.
    """
    orders = {name: _shuffled(name, len(task.eval_docs)) for name, task in sorted(tasks.items())}
    rounds = max((len(order) for order in orders.values()), default=0)
    row = [(name, order[i]) for i in range(rounds) for name, order in orders.items() if i < len(order)]
    chosen: dict[str, list[int]] = {}
    for name, document in row[start:stop]:
        chosen.setdefault(name, []).append(document)
    return {name: sorted(documents) for name, documents in chosen.items()}


def _shuffled(name: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(name).shuffle(order)
    return order
