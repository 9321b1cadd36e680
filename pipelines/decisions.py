"""The small tasks between the stages: faces of `trimtab.loop.decisions`. None of them needs a GPU or imports torch."""

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
    prices: str = "",
    registry: str = "",
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
        rollout: How to serve the release, YAML or JSON; or empty. Only checked here, on the cluster too.
        prices: What an hour costs here, JSON; or empty.
        registry: The Model Registry to enter the release in; or empty. Only checked here.

    Returns:
        The URI of the document with which the baseline is measured.
    """
    from trimtab.components.deployment.rollout.delivery import foresee
    from trimtab.loop import decisions
    from trimtab.loop.documents import save
    from trimtab.recipe import Prices
    from trimtab.recipe.evaluation import Evaluation
    from trimtab.store import Tree

    foresee(rollout, store, registry)
    begun = decisions.begin(
        model=Tree.parse(model),
        store_uri=store,
        name=name,
        goal=goal,
        target=target,
        recipe=recipe,
        max_attempts=max_attempts,
        evaluation=Evaluation.parse(evaluation or "{}"),
        images=images,
        prices=Prices.parse(prices) if prices else None,
    )
    return save(begun)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def prepare(state: str, machines: dict, checkpoint: dsl.Output[dsl.Model]) -> NamedTuple(
    "Prepared",
    state=str,
    calibrate=str, calibrate_nodes=dict, calibrate_tolerations=list,
    calibrate_cpu=str, calibrate_memory=str, calibrate_image=str,
    prune=str, prune_nodes=dict, prune_tolerations=list,
    prune_cpu=str, prune_memory=str, prune_image=str,
    distill=str, distill_nodes=dict, distill_tolerations=list,
    distill_cpu=str, distill_memory=str, distill_image=str,
    recalibrate=str, recalibrate_nodes=dict, recalibrate_tolerations=list,
    recalibrate_cpu=str, recalibrate_memory=str, recalibrate_image=str,
    quantize=str, quantize_nodes=dict, quantize_tolerations=list,
    quantize_cpu=str, quantize_memory=str, quantize_image=str,
    engine=str, engine_nodes=dict, validate=str, validate_nodes=dict,
):  # fmt: skip
    """Refuses what the target cannot run or the namespace never starts, and says which machine each task needs.

    Args:
        state: The URI of the document with which the attempt begins.
        machines: What the cluster has for tasks: nodes, tolerations, the name of accelerators, and by task CPUs, memory
            and image.
        checkpoint: Names the model.

    Returns:
        The URI of the document, and for each task its count of accelerators, "0" for a pass-through or a result that
        exists; where that is "0", no node selector and no tolerations; next to no CPU and memory where it has no work.
    """
    from collections import namedtuple

    from trimtab import stages
    from trimtab.loop import decisions
    from trimtab.loop.documents import load, save
    from trimtab.pipelines.cluster.capacity import refuse_there

    ready = refuse_there(stages.refuse_here(decisions.prepare(load(state))), machines)
    stages.describe_tree(checkpoint, ready.model)
    found = {"state": save(ready)}
    for task, machine in stages.machines(ready, machines).items():
        found[task] = machine.pop("accelerators")
        found |= {f"{task}_{field}": value for field, value in machine.items()}
    return namedtuple("Prepared", found)(**found)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def decide(state: str, run: str) -> str:
    """Says whether another attempt is worth it.

    Args:
        state: The URI of the document of the attempt that is over.
        run: The id of the run, under which its verdicts are told.

    Returns:
        'retry' or 'stop'.
    """
    from trimtab.loop import decisions, status
    from trimtab.loop.documents import load

    now = load(state)
    status.write_attempts(now, run)
    return decisions.decide(now)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def adjust(state: str) -> str:
    """Chooses the next recipe from the ladder and the history of verdicts.

    Args:
        state: The URI of the document of the attempt that is over.

    Returns:
        The URI of the document with which the next attempt begins.
    """
    from trimtab.loop import decisions
    from trimtab.loop.documents import load, save

    return save(decisions.next_attempt(load(state)))


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def carry(state: str) -> str:
    """Carries the state past a retry that was not needed.

    Args:
        state: The URI of an attempt's document.

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
        state: The URI of the last attempt's document.
        run: The id of the run, under which its verdicts are told.
        report: All attempts, the frontier and the verdict.
        summary: The same in brief.
        outcome: The state itself, for programs.

    Returns:
        The URI of the attempt's document.
    """
    from pathlib import Path

    from trimtab import report as pages
    from trimtab.loop import status
    from trimtab.loop.documents import load
    from trimtab.store import open_store

    now = load(state)
    status.write_attempts(now, run)
    texts = pages.side_by_side(open_store(now.store), now)
    Path(report.path).write_text(pages.summary_html(now, texts), encoding="utf-8")
    Path(summary.path).write_text(pages.summary_markdown(now), encoding="utf-8")
    Path(outcome.path).write_text(now.to_json(), encoding="utf-8")
    return state
