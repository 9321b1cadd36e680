"""The small tasks between the stages: faces of `trimtab.flow`. None of them needs a GPU or imports torch."""

from typing import NamedTuple

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def plan(
    model: str,
    name: str,
    store: str,
    goal: str,
    target: str,
    recipe: str,
    max_attempts: int,
    evaluation: str,
    images: str = "",
    rollout: str = "",
) -> str:
    """Turns goal, model and hardware into the ladder of recipes to try.

    Args:
        model: The model's tree, JSON.
        name: The name that the release gets.
        store: URI of the store.
        goal: What to improve.
        target: The hardware that will serve the model.
        recipe: A recipe to try first, YAML or JSON; or empty.
        max_attempts: The most attempts.
        evaluation: What to measure, YAML or JSON; or empty.
        images: The container images of the stages.
        rollout: How to serve the release, YAML or JSON; or empty. Only checked here, before the work begins.

    Returns:
        The state with which the baseline is measured, JSON.
    """
    from trimtab import flow
    from trimtab.components.deployment.serving import asked
    from trimtab.state import Evaluation
    from trimtab.store import Tree

    asked(rollout, store)
    return flow.begin(
        model=Tree.parse(model),
        store_uri=store,
        name=name,
        goal=goal,
        target=target,
        recipe=recipe,
        max_attempts=max_attempts,
        evaluation=Evaluation.parse(evaluation or "{}"),
        images=images,
    ).to_json()


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def prepare(state: str, nodes: dict, checkpoint: dsl.Output[dsl.Model]) -> NamedTuple(
    "Prepared",
    state=str,
    calibrate=str,
    prune=str,
    distill=str,
    recalibrate=str,
    quantize=str,
    engine=str,
    validate=str,
    calibrate_nodes=dict,
    prune_nodes=dict,
    distill_nodes=dict,
    recalibrate_nodes=dict,
    quantize_nodes=dict,
    engine_nodes=dict,
    validate_nodes=dict,
):
    """Refuses what the target cannot run, and says how many accelerators each task needs, and on which nodes.

    Args:
        state: The state with which the attempt begins, JSON.
        nodes: The node selector of tasks that need an accelerator.
        checkpoint: Names the model.

    Returns:
        The state, and for each task its count of accelerators, "0" for a pass-through or a result that exists,
        and its node selector, {} where the count is "0".
    """
    from collections import namedtuple

    from trimtab import flow, stages
    from trimtab.state import State

    ready = flow.prepare(State.parse(state))
    stages.describe_tree(checkpoint, ready.model)
    need = stages.accelerators(ready)
    where = {f"{task}_nodes": nodes if count != "0" else {} for task, count in need.items()}
    return namedtuple("Prepared", ["state", *need, *where])(ready.to_json(), *need.values(), *where.values())


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def decide(state: str, run: str) -> str:
    """Says whether another attempt is worth it.

    Args:
        state: The state after an attempt, JSON.
        run: The id of the run, under which its verdicts are told.

    Returns:
        'retry' or 'stop'.
    """
    from trimtab import bulletin, flow
    from trimtab.state import State

    bulletin.tell(State.parse(state), run)
    return flow.decide(State.parse(state))


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def adjust(state: str) -> str:
    """Chooses the next recipe from the ladder and the history of verdicts.

    Args:
        state: The state after an attempt, JSON.

    Returns:
        The state with which the next attempt begins, JSON.
    """
    from trimtab import flow
    from trimtab.state import State

    return flow.next_attempt(State.parse(state)).to_json()


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def carry(state: str) -> str:
    """Carries the state past a retry that was not needed.

    Args:
        state: The state, JSON.

    Returns:
        The same state.
    """
    return state


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def summarize(
    state: str,
    run: str,
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    outcome: dsl.Output[dsl.Artifact],
) -> str:
    """Tells the story of the run, for every outcome, before the gate.

    Args:
        state: The state after the last attempt, JSON.
        run: The id of the run, under which its verdicts are told.
        report: All attempts, the frontier and the verdict.
        summary: The same in brief.
        outcome: The state itself, for programs.

    Returns:
        The state, JSON.
    """
    from pathlib import Path

    from trimtab import bulletin
    from trimtab import report as pages
    from trimtab.state import State

    told = State.parse(state)
    bulletin.tell(told, run)
    Path(report.path).write_text(pages.summary_html(told), encoding="utf-8")
    Path(summary.path).write_text(pages.summary_markdown(told), encoding="utf-8")
    Path(outcome.path).write_text(state, encoding="utf-8")
    return state
