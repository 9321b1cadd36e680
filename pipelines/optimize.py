"""The pipeline `optimize`: fetch a model, plan, and try recipes until one is good enough to release."""

from kfp import dsl

from trimtab.catalog.goals import DEFAULT_GOAL
from trimtab.components.fetch.component import fetch
from trimtab.pipelines.decisions import plan
from trimtab.pipelines.loop import MAX_ATTEMPTS, Loop, offer_choices
from trimtab.stages.profile import Profile


def optimize_pipeline(unrolled: int = MAX_ATTEMPTS, profile: Profile | None = None, image: str = ""):
    """Returns the pipeline `optimize` with its loop unrolled for at most `unrolled` attempts.

    The arguments are those of `Loop`.
    """
    loop = Loop(unrolled, profile, image)

    @dsl.pipeline(
        name="optimize",
        display_name="trimtab: optimize a language model",
        description="Compresses a language model for its target and releases it only when measurements on the "
        "exported artifact say that it is still good.",
    )
    def optimize(
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
    ) -> str:
        """Compresses a language model and releases it when it is still good.

        Args:
            model: s3://bucket/prefix, a tree of the store, the address of a Model artifact of a run, a hub id such
                as org/name, a folder, or a .gguf file.
            store: Where trees, results and releases are kept: s3://bucket/prefix or a folder.
            goal: What is to become better; it decides which recipes are tried, and in which order.
            target: The hardware that will serve it, on which each attempt is built and measured; cpu takes no GPU.
            recipe: A recipe to try first, YAML or JSON; empty for the planned ladder.
            max_attempts: The most attempts, 1 to 10. Each is worked, built and measured; a good one ends the run.
            name: The name of the release.
            evaluation: Tasks, items and windows to measure, YAML or JSON; more of them decide finer and cost their time
                in each attempt. Empty for trimtab's own suite.
            rollout: How to serve the release on KServe, YAML or JSON; empty to serve it nowhere.
            registry: The Kubeflow Model Registry to enter the release in, http(s)://host[:port]; empty for none.

        Returns:
            The URI of the release.
        """
        source = loop.fetched(fetch(model=model, store=store), "fetch model")["Output"]
        planned = loop.small(
            plan(
                model=source,
                name=name,
                store=store,
                goal=goal,
                target=target,
                recipe=recipe,
                max_attempts=max_attempts,
                evaluation=evaluation,
                images=loop.images,
                rollout=rollout,
                registry=registry,
                prices=loop.prices,
            ),
            "plan",
        )
        return loop.run(planned.output, rollout, registry)

    return offer_choices(optimize, unrolled, profile)
