"""The flow: an attempt, the loop that adjusts the recipe and tries again, and the pipeline `optimize` around them.

The loop is unrolled when it is compiled, for KFP has none. What keeps it correct (each a silent failure
elsewhere): only strings pass through `dsl.OneOf`; conditions read the one output of `decide`, whose vocabulary
is closed; there are no conditions inside `attempt`; the chain ends in a gate; KFP's caching is off, because a
branch of cache hits alone never completes on the backend (the store's index is the cache). Behind the gate stands the
rollout, which does nothing unless a run asks for it; the condition on it has no Else, so it reads `Output`, the one
name that `kfp.local` resolves there (elsewhere it is silently false).
"""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from trimtab.catalog.goals import DEFAULT_GOAL, GOALS
from trimtab.components import images
from trimtab.components.calibration.component import calibrate
from trimtab.components.deployment.component import fail_rollout, gate, roll_out
from trimtab.components.distillation.component import distill
from trimtab.components.engine.component import build_engine
from trimtab.components.fetch.component import fetch
from trimtab.components.pruning.component import prune
from trimtab.components.quantization.component import quantize
from trimtab.components.validation.component import validate
from trimtab.model.hardware import TARGETS
from trimtab.pipelines.decisions import adjust, carry, decide, plan, prepare, summarize
from trimtab.pipelines.package import ROLLED_BACK, ROLLOUT
from trimtab.pipelines.placement import place, reach, sign
from trimtab.stages import TASKS
from trimtab.stages.profile import Profile

#: The most attempts that are unrolled; `max_attempts` of a run is at most this.
MAX_ATTEMPTS = 10
#: What the gate is called on the page of a run: the only task that sees the signing key.
GATE = "deploy gate"
RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER
#: What the run form offers for a parameter.
CHOICES = {"goal": GOALS, "target": TARGETS}
#: Gives a small task its name and what it needs to reach the store.
Small = Callable[[dsl.PipelineTask, str], dsl.PipelineTask]


def uncached(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Names a task, and turns KFP's cache off: see the module."""
    return task.set_caching_options(False).set_display_name(name)


def attempt_pipeline(profile: Profile):
    """Returns the pipeline `attempt`: one recipe, its tasks placed as the profile says."""

    @dsl.pipeline(
        name="attempt", description="One recipe: prepare, calibrate, prune, distill, quantize, build, validate"
    )
    def attempt(state: str) -> str:
        """One recipe carried through all stages; a stage that the recipe does not ask for passes its input on.

        Args:
            state: The URI of the document with which the attempt begins.

        Returns:
            The URI of the attempt's document with the verdict.
        """
        ready = uncached(prepare(state=state, nodes=profile.gpu.node_selector), "prepare")
        need = reach(ready, profile).outputs

        def staged(task: dsl.PipelineTask, stage: str, name: str = "") -> dict[str, object]:
            uncached(task, name or stage)
            return place(task, stage, profile, need[stage], need[f"{stage}_nodes"]).outputs

        calibrated = staged(calibrate(state=need["state"], checkpoint=need["checkpoint"]), "calibrate")
        pruned = staged(
            prune(
                state=calibrated["Output"], checkpoint=need["checkpoint"], calibration=calibrated["calibration"]
            ),
            "prune",
        )
        distilled = staged(distill(state=pruned["Output"], checkpoint=pruned["pruned"]), "distill")
        again = staged(
            calibrate(
                state=distilled["Output"], checkpoint=distilled["distilled"], stages=" ".join(TASKS["recalibrate"])
            ),
            "recalibrate",
        )
        quantized = staged(
            quantize(state=again["Output"], checkpoint=distilled["distilled"], calibration=again["calibration"]),
            "quantize",
        )
        built = staged(build_engine(state=quantized["Output"], export=quantized["export"]), "engine", "build engine")
        judged = staged(validate(state=built["Output"], engine=built["engine"]), "validate")
        return judged["Output"]

    return attempt


def small_tasks(profile: Profile) -> Small:
    """Returns what places a task that does no work on a model."""

    def small(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
        reach(uncached(task, name), profile)
        return sign(task, profile) if name == GATE else task

    return small


def image_names(profile: Profile, image: str = "") -> str:
    """Returns the container images of the stages, which are materials of the run."""
    return " ".join(filter(None, (image or images.CPU, profile.images.cuda, profile.images.engine)))


def loop(planned: object, rollout: object, attempt: BaseComponent, small: Small, unrolled: int) -> object:
    """Adds the baseline, the attempts, the summary, the gate and the rollout to the pipeline that is being traced.

    Args:
        planned: the state with which the baseline is measured, an output of a task.
        rollout: how to serve the release, a parameter of the pipeline.

    Returns:
        The URI of the release, an output of the gate.
    """
    measured = attempt(state=planned).set_display_name("baseline")
    begun = small(adjust(state=measured.output), "choose the first recipe")
    state = attempt(state=begun.output).set_display_name("attempt 1").output
    for number in range(2, unrolled + 1):
        decision = small(decide(state=state, run=RUN_ID), f"retry after attempt {number - 1}?")
        with dsl.If(decision.output == "retry", name=f"retry-{number}"):
            adjusted = small(adjust(state=state), "adjust the recipe")
            again = attempt(state=adjusted.output).set_display_name(f"attempt {number}")
        with dsl.Else(name=f"keep-{number}"):
            kept = small(carry(state=state), "keep the verdict")
        state = dsl.OneOf(again.output, kept.output)
    told = small(summarize(state=state, run=RUN_ID), "summary").outputs["Output"]
    released = small(gate(state=told), GATE).outputs["Output"]
    deliver(released, rollout, small)
    return released


def deliver(released: object, rollout: object, small: Small) -> None:
    """Adds the rollout of a release, and what fails the run when it was rolled back."""
    rolled = small(roll_out(release=released, rollout=rollout, run=RUN_ID), ROLLOUT).outputs
    with dsl.If(rolled["Output"] == "rolled_back", name="rolled-back"):
        small(fail_rollout(told=rolled["told"]), ROLLED_BACK)


def optimize_pipeline(unrolled: int = MAX_ATTEMPTS, profile: Profile | None = None, image: str = ""):
    """Returns the pipeline `optimize` with its loop unrolled for at most `unrolled` attempts.

    Args:
        unrolled: the most attempts.
        profile: where the tasks find GPUs, memory, credentials and a cache; None where they need no such thing.
        image: the container image that the stages will have; "" for that of this version.
    """
    profile = profile or Profile()
    attempt, small = attempt_pipeline(profile), small_tasks(profile)

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
    ) -> str:
        """Compresses a language model and releases it when it is still good.

        Args:
            model: A folder, a .gguf file, s3://bucket/prefix, a tree of the store, or a hub id such as org/name.
            store: Where trees, results and releases are kept: s3://bucket/prefix or a folder.
            goal: What is to become better.
            target: The hardware that will serve it.
            recipe: A recipe to try first, YAML or JSON; empty for the planned ladder.
            max_attempts: The most attempts, 1 to 10.
            name: The name of the release.
            evaluation: Tasks, items and windows to measure, YAML or JSON; empty for trimtab's own suite.
            rollout: How to serve the release on KServe, YAML or JSON; empty to serve it nowhere.

        Returns:
            The URI of the release.
        """
        brought = uncached(fetch(model=model, store=store), "fetch model")
        source = place(brought, "fetch", profile).outputs["Output"]
        planned = small(
            plan(
                model=source,
                name=name,
                store=store,
                goal=goal,
                target=target,
                recipe=recipe,
                max_attempts=max_attempts,
                evaluation=evaluation,
                images=image_names(profile, image),
                rollout=rollout,
            ),
            "plan",
        )
        return loop(planned.output, rollout, attempt, small, unrolled)

    offer_choices(optimize)
    return optimize


def offer_choices(pipeline: BaseComponent) -> None:
    """Makes the run form show lists to choose from, and descriptions name them: KFP's SDK has no way to say a list, and
    takes descriptions from docstrings alone."""
    parameters = pipeline.pipeline_spec.root.input_definitions.parameters
    for name, choices in CHOICES.items():
        parameters[name].description = f"{parameters[name].description.rstrip('.')}: {', '.join(choices)}."
        for choice in choices:
            parameters[name].literals.add().string_value = choice
