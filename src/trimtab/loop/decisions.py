"""The decisions between the stages, as functions from state to state: what the pipeline's small tasks call."""

from __future__ import annotations

import os
from collections.abc import Mapping

from trimtab.base import child, progress
from trimtab.base.errors import Failure, InputError, nearest
from trimtab.catalog.goals import GOALS
from trimtab.judge.power import Power
from trimtab.loop import adjust, ledger, provenance
from trimtab.loop.documents import Plan, read_plan, write_plan
from trimtab.loop.state import State, fail
from trimtab.model import hardware, layouts, memory
from trimtab.model.facts import ModelFacts
from trimtab.planning import checks, dealing, drawing, matrix, placement, resources, task_sizes
from trimtab.planning.dealing import Deal
from trimtab.planning.matrix import MAX_RUNGS, Outline, Rung
from trimtab.planning.resources import Resources
from trimtab.recipe import Acceptance, Prices, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.recipe.workload import Workload
from trimtab.serving import traffic as recorded
from trimtab.serving.traffic import Traffic
from trimtab.store import Store, Tree, open_store
from trimtab.store.address import check_name


def begin(
    *,
    model: Tree,
    store_uri: str,
    name: str,
    goal: str,
    target: str,
    recipe: str,
    max_attempts: int,
    evaluation: Evaluation,
    images: str = "",
    released: Rung | None = None,
    traffic: Traffic | None = None,
    prices: Prices | None = None,
) -> State:
    """Plans the run and returns the state with which the baseline is measured.

    A recipe that names no step is not tried as one; its `accept`, `calibrate` and back end hold for the whole
    ladder all the same, and its `workload` sizes all engines.

    Args:
        images: the container images of the stages, which count among the materials.
        released: the recipe of a release with its student, which then stands first.
        traffic: the shape of the recorded traffic, where the recipe names some and it was read before.
        prices: what an hour costs where the run works.

    Raises:
        InputError: a name that no release can have, an unknown goal or target, a bad recipe, recorded traffic that
            cannot be read, a model or recipe that the target cannot run, or tasks that do not exist or have too few
            items.
    """
    check_name(name, "release")
    if goal not in GOALS:
        raise InputError(f"goal: '{goal}' is not valid; {nearest(goal, GOALS)}")
    store, machine = open_store(store_uri), hardware.target(target)
    if child.RUN_PID in os.environ:  # elsewhere stages run on other machines
        machine = hardware.on_this_machine(machine)
    wanted, facts = Recipe.parse(recipe) if recipe.strip() else Recipe(), facts_of(store, model)
    traffic = traffic or recorded.of(wanted.workload)
    wanted = _for_traffic(wanted, traffic)
    check_limits(wanted, prices)
    dealt = dealing.deal(task_sizes.of(evaluation), evaluation, wanted.accept, max_attempts)
    power = drawing.assumed(dealt, evaluation, wanted.accept, max_attempts)
    progress.report("plan", power.sentence)
    rungs = ladder(goal, facts, machine, wanted)
    if released and wanted.workload:
        released = _sized(released, facts, machine, wanted.workload)
    if released:
        others = [rung for rung in rungs if rung.recipe.digest != released.recipe.digest]
        rungs = [released, *others][:MAX_RUNGS]
    unchanged, needs = _baseline(goal, facts, machine, rungs, wanted, evaluation)
    made_of = provenance.gather(
        model=model,
        recipe=wanted,
        goal=goal,
        target=machine.name,
        max_attempts=max_attempts,
        evaluation=evaluation,
        images=images,
        traffic=traffic,
        converted=store.manifest(model).metadata.get(layouts.CONVERTED, ()),
    )
    planned = {
        "name": name,
        "goal": goal,
        "target": machine.name,
        "model": model,
        "max_attempts": max_attempts,
        "evaluation": evaluation,
        "limits": wanted.limits,
        "prices": prices,
    }
    whole = Plan(
        **planned,
        ladder=tuple(rungs),
        baseline=unchanged.recipe,
        resources=needs,
        materials=made_of.model_dump(mode="json"),
        dealt=dealt,
    )
    where = write_plan(store, whole)
    return State(store=store.uri, **planned, plan=where, recipe=unchanged.recipe, why=unchanged.why)


def check_limits(wanted: Recipe, prices: Prices | None) -> None:
    """Refuses a limit of money where nobody has said what an hour costs."""
    if wanted.limits and wanted.limits.cost and prices is None:
        raise InputError(
            f"limits.cost: {wanted.limits.cost:g} needs prices; write prices: {{gpu_hour: 2.5}} into the cluster's "
            "profile, or limits: {gpu_hours: 4}"
        )


def ladder(goal: str, facts: ModelFacts, machine: hardware.Hardware, wanted: Recipe) -> list[Rung]:
    """Returns the recipes that a run will try.

    Args:
        wanted: the user's recipe, tried first where it names a step.

    Raises:
        InputError: recorded traffic that cannot be read, or a model, recipe or workload that the target cannot run.
    """
    return _climbed(goal, facts, machine, wanted)[0]


def outline(
    goal: str,
    facts: ModelFacts,
    machine: hardware.Hardware,
    wanted: Recipe,
    evaluation: Evaluation | None = None,
) -> Outline:
    """Returns what a run would do, as plain data (see `plan.outline`): its baseline, its ladder, what it leaves out.

    Args:
        evaluation: what is measured; the default if absent.

    Raises:
        InputError: as `ladder`; or nothing of the target serves the unchanged model, nothing can be gained, or the
            unchanged model is measured in a way that the evaluation does not allow.
    """
    evaluation = evaluation or Evaluation()
    wanted = _for_traffic(wanted, recorded.of(wanted.workload))
    rungs, refused = _climbed(goal, facts, machine, wanted)
    unchanged, needs = _baseline(goal, facts, machine, rungs, wanted, evaluation)
    return matrix.outline(unchanged, rungs, refused, needs)


def _baseline(
    goal: str,
    facts: ModelFacts,
    machine: hardware.Hardware,
    rungs: list[Rung],
    wanted: Recipe,
    evaluation: Evaluation,
) -> tuple[Rung, dict[str, dict[str, Resources]]]:
    """Returns how the unchanged model is measured, and what the stages of it and of the rungs need, by digest."""
    unchanged = matrix.baseline(goal, facts, machine, rungs, wanted.workload, wanted.engine.world_size)
    needs = _needs(facts, machine, unchanged, rungs, evaluation)
    return _measurable(unchanged, facts, machine, rungs, evaluation, needs), needs


def _measurable(
    unchanged: Rung,
    facts: ModelFacts,
    machine: hardware.Hardware,
    rungs: list[Rung],
    evaluation: Evaluation,
    needs: Mapping[str, Mapping[str, Resources]],
) -> Rung:
    """Returns how the unchanged model is measured; where that is block by block, with how long it takes.

    Raises:
        InputError: then a task lets the models write.
    """
    if not unchanged.recipe.engine.by_block:
        return unchanged
    if tasks := task_sizes.writing(evaluation):
        holders = placement.holders(facts, machine, rungs[0].recipe.engine.backend)
        instead = f", or write target: {holders}" if holders else ""
        raise InputError(
            f"tasks: {', '.join(tasks)} let a model write, and the unchanged one is scored block by block, which reads "
            f"all of it for each token; name tasks of multiple choice{instead}"
        )
    *_, time = resources.columns(needs[unchanged.recipe.digest][resources.JUDGE])
    told = f"slow, about {time} for a look and a confirmation"
    return unchanged.model_copy(update={"why": f"{unchanged.why}; {told}"})


def _needs(
    facts: ModelFacts, machine: hardware.Hardware, unchanged: Rung, rungs: list[Rung], evaluation: Evaluation
) -> dict[str, dict[str, Resources]]:
    """What each stage of the baseline and of each rung needs, by the digest of its recipe."""
    base = unchanged.recipe
    found = {base.digest: resources.needs(facts, base, machine, None, evaluation)}
    for recipe in (rung.recipe for rung in rungs):
        found[recipe.digest] = resources.needs(facts, recipe, machine, base, evaluation)
    return found


def _climbed(
    goal: str, facts: ModelFacts, machine: hardware.Hardware, wanted: Recipe
) -> tuple[list[Rung], list[matrix.Refused]]:
    if wanted.engine.by_block:
        raise InputError("engine.by_block: is how a plan measures an unchanged model that nothing holds; remove it")
    wanted = _for_traffic(wanted, recorded.of(wanted.workload))
    wanted = wanted.model_copy(update={"limits": None})  # the run's, and no attempt's
    first = wanted if wanted.prune or wanted.distill or wanted.quantize else None
    rungs, refused = matrix.climb(
        goal,
        facts,
        machine,
        accept=wanted.accept,
        backend=wanted.engine.backend if first or "backend" in wanted.engine.model_fields_set else None,
        first=first,
        workload=wanted.workload,
    )
    calibrated = {"calibrate": wanted.calibrate}
    return [rung.model_copy(update={"recipe": rung.recipe.model_copy(update=calibrated)}) for rung in rungs], refused


def _sized(released: Rung, facts: ModelFacts, machine: hardware.Hardware, workload: Workload) -> Rung | None:
    """Gives a released recipe an engine for another workload; None where it does not fit any more."""
    try:
        sized = placement.sized(released.recipe, facts, machine, workload)
    except InputError as error:
        progress.report("plan", f"the recipe of the last release is not tried: {error}")
        return None
    return released.model_copy(update={"recipe": sized})


def _for_traffic(wanted: Recipe, traffic: Traffic | None) -> Recipe:
    """Returns the recipe with the workload that was recorded."""
    return wanted.model_copy(update={"workload": traffic.workload}) if traffic else wanted


def prepare(state: State) -> State:
    """Refuses, before a GPU is asked for, a recipe that its target cannot run or hold; the baseline was placed so that
    it is held (`plan.baseline`)."""
    if state.verdict or state.attempt == 0:
        return state
    facts, machine = facts_of(open_store(state.store), state.model), hardware.target(state.target)
    reason = checks.refusal(state.recipe, machine, facts)
    if reason:
        return fail(state, "prepare", Failure("unsupported", reason))
    need = memory.memory(facts, state.recipe, machine)
    if not need.fits:
        return fail(state, "prepare", Failure("does_not_fit", need.explanation))
    return state


def decide(state: State) -> str:
    """Returns 'retry' or 'stop'."""
    if state.baseline is None or state.baseline.verdict.outcome != "baseline":
        return "stop"
    if state.history and state.history[-1].verdict.outcome == "accepted":
        return "stop"
    if over := ledger.exhausted(state):
        progress.report("decide", over)
        return "stop"
    return "retry" if len(state.history) < state.max_attempts and _next(state)[0] else "stop"


def next_attempt(state: State) -> State:
    """Returns the state with which the next attempt begins; unchanged when the baseline itself failed, or took all that
    the run may spend."""
    if state.baseline is None or state.baseline.verdict.outcome != "baseline" or ledger.exhausted(state):
        return state
    rung, why = _next(state)
    if rung is None:
        return state
    progress.report(f"attempt {len(state.history) + 1}", f"{rung.recipe.title}; {why}")
    return state.model_copy(
        update={
            "plan": state.plan if state.history else _drawing_enough(state),
            "attempt": len(state.history) + 1,
            "recipe": rung.recipe,
            "why": why,
            "trees": {"checkpoint": rung.student} if rung.student else {},
            "verdict": None,
            "seconds": {},
            "used": {},
            "cpu_seconds": {},
        }
    )


def accepted_by(plan: Plan) -> Acceptance:
    """Returns the limits of a run, which all its recipes have."""
    return plan.ladder[0].recipe.accept


def drawn(plan: Plan, power: Power) -> Deal:
    """Returns the items that a run draws, given what those dealt first can show."""
    if not power.wanted:
        return plan.dealt
    return drawing.enlarged(plan.dealt, power, accepted_by(plan), plan.max_attempts)


def _drawing_enough(state: State) -> Tree:
    """Returns the plan with as many items as the baseline's answers ask for, before the first attempt is paid for."""
    store, power = open_store(state.store), state.baseline.verdict.power
    plan = read_plan(store, state.plan)
    if power is None or plan.dealt is None or (more := drawn(plan, power)) == plan.dealt:
        return state.plan
    return write_plan(store, plan.model_copy(update={"dealt": more}))


def facts_of(store: Store, model: Tree) -> ModelFacts:
    """Returns what fetch wrote down about the model; its weights stay where they are."""
    return ModelFacts.model_validate(store.manifest(model).metadata["facts"])


def _next(state: State) -> tuple[Rung | None, str]:
    store, machine = open_store(state.store), hardware.target(state.target)
    rungs, facts = list(read_plan(store, state.plan).ladder), facts_of(store, state.model)
    rung, why = adjust.next_recipe(
        rungs, state.history, lambda recipe: checks.refusal(recipe, machine, facts) is None
    )
    return rung and rung.model_copy(update={"student": _student(rungs, rung.recipe)}), why


def _student(rungs: list[Rung], recipe: Recipe) -> Tree | None:
    """The student that a recipe goes on from: that of a rung which prunes alike, for remedies are on no rung."""
    if recipe.distill is None:
        return None
    return next((rung.student for rung in rungs if rung.student and rung.recipe.prune == recipe.prune), None)
