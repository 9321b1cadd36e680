"""The pipeline `rebuild`, for schedules: its first task alone says whether anything has changed since the last release.

The condition on that task has no Else: a run without changes is one task. It reads the output named `Output`, the only
name that `kfp.local` resolves for a condition without Else beside its producer (elsewhere it is silently false).
"""

from typing import NamedTuple

from kfp import dsl

from trimtab.catalog.goals import DEFAULT_GOAL
from trimtab.components import images as names
from trimtab.pipelines.loop import MAX_ATTEMPTS, Loop, offer_choices
from trimtab.pipelines.package import REVIEW
from trimtab.stages.profile import Profile


@dsl.component(base_image=names.CPU, install_kfp_package=False)
def review(
    model: str,
    name: str,
    store: str,
    goal: str,
    target: str,
    recipe: str,
    max_attempts: int,
    evaluation: str,
    images: str,
    rollout: str,
    prices: str,
    registry: str,
    changes: dsl.Output[dsl.Markdown],
) -> NamedTuple("Review", Output=str, state=str):
    """Compares what a run would be made of now with what the last release is made of, and plans the run.

    Args:
        model: Where the base model is.
        name: The name of the release.
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
        changes: What changed.

    Returns:
        Output: 'rebuild' or 'keep'.
        state: The URI of the document with which the baseline is measured.
    """
    from collections import namedtuple
    from pathlib import Path

    from trimtab.base import child
    from trimtab.components.deployment.rollout.delivery import foresee
    from trimtab.components.fetch.source import fetch
    from trimtab.loop.documents import save
    from trimtab.recipe import Prices
    from trimtab.recipe.evaluation import Evaluation
    from trimtab.release import rebuild
    from trimtab.store import open_store
    from trimtab.store.address import check_name

    child.follow_run()
    check_name(name, "release")
    foresee(rollout, store, registry)
    found, state = rebuild.plan(
        model=fetch(model, open_store(store)),
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
    Path(changes.path).write_text(found.markdown, encoding="utf-8")
    return namedtuple("Review", ["Output", "state"])(found.outcome, save(state))


def rebuild_pipeline(unrolled: int = MAX_ATTEMPTS, profile: Profile | None = None, image: str = ""):
    """Returns the pipeline `rebuild`; the arguments are those of `Loop`."""
    loop = Loop(unrolled, profile, image)

    @dsl.pipeline(
        name="rebuild",
        display_name="trimtab: rebuild a release where something changed",
        description="Compares the base model, the data, the recipe, the images, the versions, the target and the "
        "recorded traffic with those of the last release. Where nothing changed, that is all; otherwise the model is "
        "optimized anew.",
    )
    def rebuild(
        model: str,
        store: str,
        goal: str = DEFAULT_GOAL,
        target: str = "cpu",
        recipe: str = "",
        max_attempts: int = 5,
        name: str = "model",
        evaluation: str = "",
        rollout: str = "",
        registry: str = "",
    ):
        """Releases a model anew when what it is made of has changed.

        Args:
            model: s3://bucket/prefix, a tree of the store, the address of a Model artifact of a run, a hub id such
                as org/name, a folder, or a .gguf file.
            store: Where trees, results and releases are kept: s3://bucket/prefix or a folder.
            goal: What is to become better; it decides which recipes are tried, and in which order.
            target: The hardware that will serve it, on which each attempt is built and measured; cpu takes no GPU.
            recipe: A recipe to try first, YAML or JSON; empty for the planned ladder.
            max_attempts: The most attempts, 1 to 10. Each is worked, built and measured; a good one ends the run.
            name: The name of the release, whose newest version is compared.
            evaluation: Tasks, items and windows to measure, YAML or JSON; more of them decide finer and cost their time
                in each attempt. Empty for trimtab's own suite.
            rollout: How to serve the release on KServe, YAML or JSON; empty to serve it nowhere.
            registry: The Kubeflow Model Registry to enter the release in, http(s)://host[:port]; empty for none.
        """
        reviewed = review(
            model=model,
            name=name,
            store=store,
            goal=goal,
            target=target,
            recipe=recipe,
            max_attempts=max_attempts,
            evaluation=evaluation,
            images=loop.images,
            rollout=rollout,
            prices=loop.prices,
            registry=registry,
        )
        found = loop.fetched(reviewed, REVIEW)
        with dsl.If(found["Output"] == "rebuild", name="something-changed"):
            loop.run(found["state"], rollout, registry)

    return offer_choices(rebuild, unrolled, profile)
