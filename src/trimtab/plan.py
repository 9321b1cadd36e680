"""The decision matrix: a goal, a model and a target become a ladder of recipes, each with its reason.

The recipes and their order are those of `trimtab.candidates`, their engines those of `trimtab.placing`. Only what the
target can run and what fits into its memory stands on the ladder.
"""

from __future__ import annotations

from trimtab.candidates import CANDIDATES, Kit
from trimtab.errors import InputError, nearest
from trimtab.hardware import BACKENDS, Hardware, check
from trimtab.loop.state import GOALS
from trimtab.memory import memory
from trimtab.model import ModelFacts
from trimtab.placing import for_workload, sized
from trimtab.recipe import Acceptance, Recipe
from trimtab.schema import Document
from trimtab.serving.plan import check_length
from trimtab.serving.workload import Workload
from trimtab.store.tree import Tree

MAX_RUNGS = 10


class Rung(Document):
    """A recipe on the ladder, and why it stands there.

    `student` is a distilled model from which its training goes on, instead of from a newly pruned one.
    """

    recipe: Recipe
    why: str
    student: Tree | None = None


def ladder(
    goal: str,
    facts: ModelFacts,
    hardware: Hardware,
    *,
    accept: Acceptance | None = None,
    backend: str | None = None,
    first: Recipe | None = None,
    workload: Workload | None = None,
) -> list[Rung]:
    """Returns the recipes to try, in order; at most `MAX_RUNGS`, each a different piece of work.

    Args:
        goal: one of `trimtab.loop.state.GOALS`.
        accept: what every recipe of the ladder must keep; the defaults of `Acceptance` when absent.
        backend: the engine; the back end of `first`, or the target's default, when absent.
        first: the user's own recipe, which stands first as it is.
        workload: what every engine is sized for, that of `first` too; the goal's own sizes when absent.

    Raises:
        InputError: no such goal or back end, a workload beyond the model's context, `first` cannot run on the target,
            or nothing can.
    """
    if goal not in GOALS:
        raise InputError(f"goal: '{goal}' is not known; {nearest(goal, GOALS)}")
    backend = backend or (first.engine.backend if first else hardware.default_backend)
    if backend not in hardware.formats:
        known = "does not run on " + hardware.name if backend in BACKENDS else "is not known"
        raise InputError(f"engine.backend: '{backend}' {known}; {nearest(backend, hardware.backends)}")
    if workload:  # once, and not as what is wrong with a recipe
        check_length(facts, workload)
    own = _users_own(first, facts, hardware, workload) if first else None
    rungs = {own.recipe.digest: own} if own else {}
    kit = Kit(goal, facts, hardware, backend, workload)
    refused = ""
    for steps, why in CANDIDATES[goal](kit):
        recipe, note = kit.place(steps.model_copy(update={"accept": accept or Acceptance()}))
        if recipe:
            rungs.setdefault(recipe.digest, Rung(recipe=recipe, why="; ".join(filter(None, (why, note)))))
        else:
            refused = note if "does not fit" in note else refused or note
    if not rungs:
        raise InputError(f"target: {hardware.name} runs no recipe for {goal} of this model: {refused}")
    return list(rungs.values())[:MAX_RUNGS]


def _users_own(recipe: Recipe, facts: ModelFacts, hardware: Hardware, workload: Workload | None) -> Rung:
    if reason := check(recipe, hardware, facts):
        raise InputError(reason)
    if workload:
        recipe = sized(recipe, facts, hardware, workload)
    need = memory(facts, recipe, hardware)
    if not need.fits:
        raise InputError(
            f"engine: {need.explanation}; write a smaller max_batch_size or max_seq_len, or fewer bits"
        )
    why = "the recipe that the user gave"
    if workload:
        why += f"; {for_workload(workload, recipe)}"
    if hardware.is_emulated(recipe):
        why += f"; judged by emulation, because {hardware.name} does not compute in {recipe.quantize.format}"
    if hardware.is_kv_cache_emulated(recipe):
        why += f"; its KV cache in {recipe.quantize.kv_cache} is judged by emulation and takes 16 bits here"
    return Rung(recipe=recipe, why=why)
