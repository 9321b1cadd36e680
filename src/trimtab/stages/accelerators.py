"""What each task needs, said before any of them starts: next to nothing where it would only pass on or look up.

This is computed in a task without GPU, in an image that may have other libraries than the stages'. What is known there
of a stage's environment is what its own task has written into the state in an earlier attempt of the run (`face.run`):
the tasks of the baseline run in the same images as all others, though most have nothing to do. So the keys of stages
that declare libraries alone can be followed; where nothing was written, in the first attempt of a pipeline without a
baseline, a stage counts as one that must run. A stage that declares its device gets it whenever it is asked for:
without it, it could not even look its result up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimtab.base import child, environment
from trimtab.base.errors import Failure
from trimtab.loop.decisions import facts_of
from trimtab.loop.ledger import accelerators_of
from trimtab.loop.state import State, fail
from trimtab.model import hardware
from trimtab.planning import resources
from trimtab.planning.resources import Resources
from trimtab.stages.execution import inputs_of, is_asked
from trimtab.stages.registry import STAGES, TASKS
from trimtab.store import open_store
from trimtab.store.cache import cache_folder
from trimtab.store.tree import Tree

#: The task that judges the artifact: it measures, so it needs what the engine runs on, also where all was measured.
JUDGE = "validate"
#: The tasks that a recipe may not ask for. An engine and a judgement have work in every attempt that gets so far, so
#: that only their accelerators are said beforehand: each thing more that is said makes the Workflow of a run larger.
OPTIONAL = tuple(task for task in TASKS if task != "engine")
#: What a task gets that has no work to do: Python starts, reads a document and writes one.
LITTLE = {"cpu": "500m", "memory": "1Gi"}


@dataclass(frozen=True)
class Need:
    """What a task needs. With `works` it has work to do; with `anywhere` it needs nothing of its own image either, for
    it passes on, and the libraries of that image are known."""

    accelerators: int
    works: bool
    anywhere: bool


def needs(state: State) -> dict[str, Need]:
    """Returns for each of TASKS, and for validation, what it needs: the most that any of its stages does.

    Follows the chain of keys through the index as far as results exist; behind the first missing one every wanted stage
    must run.
    """
    working = {} if state.verdict else _working(state)
    asked = {} if state.verdict else {JUDGE, *(name for name, stage in STAGES.items() if is_asked(stage, state))}
    found = {}
    for task, names in {**TASKS, JUDGE: (JUDGE,)}.items():
        counts = [working[name] for name in names if name in working]
        known = all(name in state.libraries for name in names)
        found[task] = Need(
            accelerators=0 if state.target == "cpu" else max(counts, default=0),
            works=bool(counts),
            anywhere=known and not any(name in asked for name in names),
        )
    return found


def accelerators(state: State) -> dict[str, str]:
    """Returns for each task the count of accelerators, as KFP wants it: "0" where it has no work to do with one."""
    return {task: str(need.accelerators) for task, need in needs(state).items()}


def machines(state: State, offered: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns for each task the machine to ask for.

    Args:
        offered: what the cluster has for tasks with work: `nodes` and `tolerations` of those with an accelerator, by
            task in `tasks` its `cpu`, `memory` and `image`; and in `small` the image of tasks that pass on.

    Returns:
        By task: `accelerators`, a count as text, and `nodes`, a selector; of OPTIONAL ones also `tolerations`, `cpu`,
        `memory` and `image`. Where the cluster's profile names no memory for work, it is what the work is forecast to
        need (`planning.resources`).
    """
    found = {}
    foreseen = cache(lambda: forecast(state))
    for task, need in needs(state).items():
        found[task] = {
            "accelerators": str(need.accelerators),
            "nodes": offered["nodes"] if need.accelerators else {},
        }
        if task in OPTIONAL:
            own = offered["tasks"][task]
            found[task] |= {
                "tolerations": offered["tolerations"] if need.accelerators else [],
                "image": offered["small"] if need.anywhere else own["image"],
                **{name: own[name] if need.works else LITTLE[name] for name in LITTLE},
            }
            if need.works and not own["memory"]:
                most = max(foreseen()[name].host_bytes for name in TASKS[task] if name in foreseen())
                found[task]["memory"] = resources.quantity(most)
    return found


def forecast(state: State) -> dict[str, Resources]:
    """Returns what each stage of the attempt needs that its recipe asks for, and validation."""
    facts, target = facts_of(open_store(state.store), state.model), hardware.target(state.target)
    baseline = state.baseline.recipe if state.baseline and state.attempt else None
    return resources.needs(facts, state.recipe, target, baseline, state.evaluation)


def refuse_here(state: State) -> State:
    """Refuses, on a machine of one's own, an attempt whose work this machine has no memory or disk for, before it
    begins; the next recipe may need less. In a cluster each task has another machine, which is asked for.
    """
    if state.verdict or child.RUN_PID not in os.environ:
        return state
    here = state if "gpu" in environment.device() else state.model_copy(update={"target": "cpu"})
    missing = _working(here)
    needed = {name: need for name, need in forecast(here).items() if name in missing}
    found = resources.lacking_here(needed, cache_folder())
    return fail(state, found[0], Failure("does_not_fit", f"{found[0]} {found[1]}")) if found else state


def _working(state: State) -> dict[str, int]:
    """The stages that must run, and the accelerators of each."""
    baseline = state.baseline.recipe if state.baseline else None

    def several(stage: str) -> int:
        return accelerators_of(stage, state.recipe, "any", baseline)

    store, known, counts = open_store(state.store), True, {JUDGE: several(JUDGE)}
    for name, stage in STAGES.items():
        if not is_asked(stage, state):
            continue
        parameters, versions = stage.parameters(state.recipe), state.libraries.get(name)
        environment = stage.environment(parameters)
        known = known and versions is not None and not environment.measured
        key = known and stage.key(parameters, inputs_of(stage, state), environment.in_image(versions))
        if record := key and store.lookup(key):
            trees = {**state.trees, stage.output: Tree.model_validate(record["tree"])}
            state = state.model_copy(update={"trees": trees})
        else:
            known = False
            counts[name] = several(name)
    return counts
