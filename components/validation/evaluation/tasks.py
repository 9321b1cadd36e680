"""lm-eval's tasks: which there are, how many items they have, and which items a look asks."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.utils
from lm_eval.tasks import TaskManager

from trimtab.base.errors import InputError, nearest

SUITE = Path(__file__).parents[1] / "suite"

# lm-eval compiles a task's templates anew for each document, which on a GPU takes longer than answering it.
lm_eval.utils.env.from_string = functools.lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)

#: lm-eval's metrics that score one item between 0 and 1; the first that a task has counts.
ITEM_METRICS = ("acc", "exact_match", "acc_norm", "em")


def load(names: list[str], task_path: str) -> tuple[TaskManager, dict[str, Any]]:
    """Returns lm-eval's task manager and the named tasks, groups resolved into their members.

    Args:
        names: tasks or groups of lm-eval, of trimtab's own suite, or of the folder `task_path`.
        task_path: a folder of task YAMLs, or "".

    Raises:
        InputError: a task or the folder does not exist; names the nearest that does. Or a task scores no single items.
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
    tasks = manager.load(list(names))["tasks"]
    for name, task in tasks.items():
        if not set(ITEM_METRICS) & set(task.aggregation()):
            raise InputError(
                f"tasks: '{name}' scores no single items (one of {', '.join(ITEM_METRICS)}), of which baseline and "
                "candidate could be compared; name tasks of multiple choice or generation"
            )
    return manager, tasks


def _near(name: str, manager: TaskManager) -> str:
    own = sorted(task for task in manager.all_tasks if task.startswith("trimtab_"))
    hint = nearest(name, manager.all_tasks)
    return hint.split(" (valid")[0] if hint.startswith("write") else f"trimtab's own are {', '.join(own)}"


def sizes(names: list[str], task_path: str, filters: Mapping[str, str]) -> dict[str, int]:
    """Returns how many items each of the tasks has, groups resolved into their members; checks `filters` too."""
    _, tasks = load(names, task_path)
    filters_of(tasks, filters)
    return {name: len(task.eval_docs) for name, task in tasks.items()}


def writing(names: list[str], task_path: str) -> list[str]:
    """Returns those of the tasks, groups resolved into their members, that let a model write."""
    _, tasks = load(names, task_path)
    return sorted(name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until")


def filters_of(tasks: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """Returns for each task the filter that reads its answers: the named one, else the task's first.

    Raises:
        InputError: a filter is named for a task that is not asked, or that has none of this name.
    """
    for task in named:
        if task not in tasks:
            raise InputError(f"filters: there is no task '{task}' among {', '.join(sorted(tasks))}; remove it")
    chosen = {}
    for name, task in tasks.items():
        there = [known.name for known in task._filters]
        chosen[name] = named.get(name, there[0])
        if chosen[name] not in there:
            raise InputError(f"filters: '{name}' has no filter '{chosen[name]}'; write {' or '.join(there)}")
    return chosen


def choose(tasks: Mapping[str, Any], spans: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Returns the documents of each task that stand at [start, stop] in the task's own fixed order.

    The order is shuffled with the task's name as the seed, because many data sets are sorted, and a span must be a
    random sample.

    Raises:
        InputError: a task has fewer documents than it had when its items were dealt.
    """
    chosen = {}
    for name, (start, stop) in sorted(spans.items()):
        order = _shuffled(name, len(tasks[name].eval_docs))
        if stop > len(order):
            raise InputError(
                f"tasks: '{name}' has {len(order)} items, and had {stop} or more when the run was planned; begin anew"
            )
        chosen[name] = sorted(order[start:stop])
    return chosen


def _shuffled(name: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(name).shuffle(order)
    return order
