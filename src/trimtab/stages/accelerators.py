"""How many accelerators each task needs, said before any of them starts: none where it would only pass on or look up.

This is computed in a task without GPU, in an image that may have other libraries than the stages'. What is known there
of a stage's environment is what its own task has written into the state in an earlier attempt of the run (`face.run`):
the tasks of the baseline run in the same images as all others, though most have nothing to do. So the keys of stages
that declare libraries alone can be followed; where nothing was written, in the first attempt of a pipeline without a
baseline, a stage counts as one that must run. A stage that declares its device gets it whenever it is asked for:
without it, it could not even look its result up.
"""

from __future__ import annotations

from trimtab.stages.execution import inputs_of, is_asked
from trimtab.stages.registry import STAGES, TASKS
from trimtab.state import State
from trimtab.store import open_store
from trimtab.store.tree import Tree

#: The task that judges the artifact: it measures, so it needs what the engine runs on, also where all was measured.
JUDGE = "validate"


def accelerators(state: State) -> dict[str, str]:
    """Returns for each of TASKS, and for validation, the accelerators it needs, as KFP wants the count.

    That is the most that any of its stages needs: "0" where each is a pass-through or a hit. Follows the chain of keys
    through the index as far as results exist; behind the first missing one every wanted stage must run.
    """
    counts = {**dict.fromkeys(STAGES, 0), JUDGE: 0}
    if not state.verdict and state.target != "cpu":
        counts |= _needed(state)
    tasks = {**TASKS, JUDGE: (JUDGE,)}
    return {task: str(max(counts[name] for name in names)) for task, names in tasks.items()}


def _needed(state: State) -> dict[str, int]:
    """The accelerators of the stages that must run."""
    world = state.recipe.engine.world_size
    several = {"engine": world}
    # Validation measures the baseline beside the attempt, in the engine that the baseline has.
    beside = [state.baseline.recipe.engine.world_size] if state.baseline else []
    if state.recipe.distill:
        several["distill"] = state.recipe.distill.processes
    store, known, counts = open_store(state.store), True, {JUDGE: max([world, *beside])}
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
            counts[name] = several.get(name, 1)
    return counts
