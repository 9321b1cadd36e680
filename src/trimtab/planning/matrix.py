"""The decision matrix: a goal, a model and a target become a ladder of recipes, each with its reason.

The recipes are those of `planning.techniques`, in the order of the goal's row of `catalog.goals`, and their engines
those of `planning.placement`. Only what the target can run and what fits into its memory stands on the ladder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from trimtab.base.errors import InputError, nearest
from trimtab.base.schema import Document
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.goals import GOALS
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import Hardware
from trimtab.model.memory import least_training, max_context_tokens, memory, trainable, training, weight_bytes
from trimtab.planning import search
from trimtab.planning.candidates import Kit
from trimtab.planning.checks import refusal
from trimtab.planning.engine import check_length
from trimtab.planning.placement import baseline as place_baseline
from trimtab.planning.placement import for_workload, most_devices, sized
from trimtab.planning.resources import Resources
from trimtab.planning.techniques import candidates
from trimtab.recipe import Acceptance, Recipe
from trimtab.recipe.workload import Workload
from trimtab.store.tree import Tree

MAX_RUNGS = 12


class Rung(Document):
    """A recipe on the ladder, and why it stands there.

    `student` is a distilled model from which its training goes on, instead of from a newly pruned one.
    """

    recipe: Recipe
    why: str
    student: Tree | None = None


class Refused(Document):
    """A recipe that the goal asks for and that does not stand on the ladder, and why not."""

    title: str
    why: str


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
        goal: one of `trimtab.catalog.goals.GOALS`.
        accept: what every recipe of the ladder must keep; the defaults of `Acceptance` when absent.
        backend: the engine; the back end of `first`, or the target's default, when absent.
        first: the user's own recipe, which stands first as it is.
        workload: what every engine is sized for, that of `first` too; the goal's own sizes when absent.

    Raises:
        InputError: no such goal or back end, a workload beyond the model's context, `first` cannot run on the target,
            or nothing can.
    """
    return climb(goal, facts, hardware, accept=accept, backend=backend, first=first, workload=workload)[0]


def climb(
    goal: str,
    facts: ModelFacts,
    hardware: Hardware,
    *,
    accept: Acceptance | None = None,
    backend: str | None = None,
    first: Recipe | None = None,
    workload: Workload | None = None,
) -> tuple[list[Rung], list[Refused]]:
    """Returns the ladder, of which `ladder` tells, and what was left out of it."""
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
    refused: list[Refused] = []
    for steps, why in candidates(kit):
        recipe, note = kit.place(steps.model_copy(update={"accept": accept or Acceptance()}))
        if recipe:
            rungs.setdefault(recipe.digest, Rung(recipe=recipe, why="; ".join(filter(None, (why, note)))))
        else:
            refused.append(Refused(title=steps.title, why=note.removeprefix(f"{steps.title}: ")))
    if not rungs:
        tight = [other for other in refused if "does not fit" in other.why]
        last = tight[-1] if tight else refused[0] if refused else None
        why = f"{last.title}: {last.why}" if last else "the goal asks for none"
        limited = tight and hardware.devices
        more = f"; there may be room on more than the {hardware.devices} of this machine" if limited else ""
        raise InputError(f"target: {hardware.name} runs no recipe for {goal} of this model: {why}{more}")
    found = list(rungs.values())
    if workload and GOALS[goal].measure.timed:
        others = found[1:] if own else found
        order = search.faster_first([rung.recipe for rung in others], facts, hardware)
        told = [
            others[place].model_copy(update={"why": "; ".join(filter(None, (others[place].why, said)))})
            for place, said in order
        ]
        found = [*([own] if own else []), *told]
    refused += [
        Refused(title=rung.recipe.title, why=f"a run tries {MAX_RUNGS} recipes at most") for rung in found[MAX_RUNGS:]
    ]
    return found[:MAX_RUNGS], refused


def baseline(
    goal: str,
    facts: ModelFacts,
    hardware: Hardware,
    rungs: list[Rung],
    workload: Workload | None = None,
    devices: int = 1,
) -> Rung:
    """Returns the unchanged model with the engine that it is measured on, and a sentence on that (see `placement`).

    Args:
        rungs: the ladder, of which the first is what it is compared with first.
        devices: the least that it is served on, where the user says so.

    Raises:
        InputError: nothing of the target serves it in 16 bits, or no rung can be any better at the goal.
    """
    recipe, why = place_baseline(goal, facts, hardware, rungs[0].recipe.engine, workload, devices)
    if GOALS[goal].measure.computed:
        _check_longer(goal, facts, hardware, recipe, rungs)
    return Rung(recipe=recipe, why=f"the model unchanged, {why}")


def _check_longer(
    goal: str, facts: ModelFacts, hardware: Hardware, unchanged: Recipe, rungs: list[Rung]
) -> None:
    """Refuses the search for a longer context where the unchanged model has its whole context already."""
    if any(_context(facts, hardware, rung.recipe) > _context(facts, hardware, unchanged) for rung in rungs):
        return
    devices = unchanged.engine.world_size
    where = f"one {hardware.name}" if devices == 1 else f"{devices} of them, and no recipe does on fewer"
    raise InputError(
        f"goal: '{goal}' has nothing to gain on {hardware.name}: the unchanged model holds all "
        f"{facts.max_position_embeddings:,} tokens that it can read on {where}; write {GOALS[goal].instead}"
    )


def _context(facts: ModelFacts, hardware: Hardware, recipe: Recipe) -> float:
    """Tokens of context on each device, as they will be measured."""
    tokens = max_context_tokens(facts, recipe, hardware, sum(weight_bytes(facts, recipe)))
    return tokens / recipe.engine.world_size


class Outlined(TypedDict):
    """A recipe of a plan, as plain data.

    `why` is a sentence; the baseline's says how it is served. `recipe` is all that differs from the defaults.
    `placement` has the `devices` of one copy of the model, the `backend`, how the devices are shared
    (`tensor_parallel_size`, `pipeline_parallel_size`), and the limits `max_batch_size`, `max_seq_len` and
    `max_num_tokens`. `resources` say for each stage what it needs: `gpus` with `gpu_bytes` each, `host_bytes` of
    memory, `disk_bytes` of scratch, and about how many `seconds`.
    """

    title: str
    why: str
    placement: dict[str, Any]
    recipe: dict[str, Any]
    resources: dict[str, dict[str, Any]]


class Outline(TypedDict):
    """A plan as plain data: the baseline, and the rungs in the order in which they are tried.

    `refused` has the `title` of each recipe that the goal asks for and that is not tried, and `why`. `power` says what
    the items can show (`judge.power`), and has a sentence in `told`.
    """

    baseline: Outlined
    rungs: list[Outlined]
    refused: list[dict[str, str]]
    power: NotRequired[dict[str, Any]]


def outline(
    baseline: Rung, rungs: list[Rung], refused: list[Refused], needs: Mapping[str, Mapping[str, Resources]]
) -> Outline:
    """Returns a plan as plain data, for scripts.

    Args:
        needs: what each stage needs, by the recipe's digest.
    """
    return {
        "baseline": _shown(baseline, needs),
        "rungs": [_shown(rung, needs) for rung in rungs],
        "refused": [other.model_dump(mode="json") for other in refused],
    }


def _shown(rung: Rung, needs: Mapping[str, Mapping[str, Resources]]) -> Outlined:
    fields = ("tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_seq_len", "max_num_tokens")
    engine = rung.recipe.engine
    placement = {"devices": engine.world_size, "backend": engine.backend}
    return {
        "title": rung.recipe.title,
        "why": rung.why,
        "placement": placement | {name: getattr(engine, name) for name in fields},
        "recipe": rung.recipe.to_dict(),
        "resources": {name: need.model_dump(mode="json") for name, need in needs[rung.recipe.digest].items()},
    }


def _fitting(recipe: Recipe, facts: ModelFacts, hardware: Hardware) -> str:
    """Says that a training does not fit, and what to write so that it does."""
    most = most_devices(recipe, hardware)
    need, fits = training(facts, recipe, hardware), trainable(facts, recipe, hardware, most)
    if fits is None:
        least = least_training(facts, recipe, hardware, most).explanation
        return f"{least}, even one window at a time; write a larger target, prune more, or leave distill out"
    fields = ("processes", "gradient_accumulation")
    pairs = ((name, getattr(recipe.distill, name), getattr(fits.distill, name)) for name in fields)
    parts = [f"{name}: {better}" for name, own, better in pairs if better != own]
    parts += ["activation_checkpointing: true"] if fits.distill.activation_checkpointing else []
    return f"{need.explanation}; write {' and '.join(parts)}"


def _users_own(recipe: Recipe, facts: ModelFacts, hardware: Hardware, workload: Workload | None) -> Rung:
    if reason := refusal(recipe, hardware, facts):
        raise InputError(reason)
    if workload:
        recipe = sized(recipe, facts, hardware, workload)
    need = memory(facts, recipe, hardware)
    if not need.fits:
        raise InputError(
            f"engine: {need.explanation}; write a smaller max_batch_size or max_seq_len, or fewer bits"
        )
    if recipe.distill and not training(facts, recipe, hardware).fits:
        raise InputError(f"distill: {_fitting(recipe, facts, hardware)}")
    why = "the recipe that the user gave"
    if workload:
        why += f"; {for_workload(workload, recipe)}"
    if hardware.is_emulated(recipe):
        why += f"; judged by emulation, because {hardware.name} does not compute in {recipe.quantize.format}"
    if hardware.is_kv_cache_emulated(recipe):
        why += f"; its KV cache in {recipe.quantize.kv_cache} is judged by emulation and takes 16 bits here"
    return Rung(recipe=recipe, why=why)
