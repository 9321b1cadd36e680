"""The loop that adjusts the recipe and tries again, from the baseline to the rollout: the tail of both pipelines.

It is unrolled when it is compiled. `dsl.ParallelFor` with a parallelism of 1 would be of constant size, but KFP 2.17
ignores `set_retry` in it (kubeflow/pipelines #12389, #13897), so that a pod that is lost ends the run; its rounds have
no names by which a page or `trimtab watch` tells attempts apart; and rounds that are not needed have their pods all the
same.

What keeps it correct (each a silent failure elsewhere): only strings pass through `dsl.OneOf`, for `kfp.local` takes no
artifacts there; conditions read the one output of `decide`, whose vocabulary is closed; there are no conditions inside
`attempt`; the chain ends in a gate; KFP's caching is off, because a branch of cache hits alone never completes on the
backend (the store's index is the cache). Behind the gate stands the rollout, which does nothing unless a run asks for
it; the condition on it has no Else, so it reads `Output`, the one name that `kfp.local` resolves there (elsewhere it is
silently false).
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from trimtab.catalog.goals import GOALS
from trimtab.components import images
from trimtab.components.deployment.component import fail_rollout, gate, roll_out
from trimtab.model.hardware import TARGETS
from trimtab.pipelines.attempt import attempt_pipeline, uncached
from trimtab.pipelines.decisions import adjust, carry, decide, summarize
from trimtab.pipelines.package import ROLLED_BACK, ROLLOUT
from trimtab.pipelines.placement import place, reach, sign
from trimtab.stages.profile import Profile

#: The most attempts that are unrolled; `max_attempts` of a run is at most this.
MAX_ATTEMPTS = 10
#: What the gate is called on the page of a run: the only task that sees the signing key.
GATE = "deploy gate"
RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER
#: What a run is for where nothing says it.
DEFAULT_TARGET = "cpu"
#: What the run form offers for a parameter.
CHOICES = {"goal": GOALS, "target": TARGETS}


class Loop:
    """The tasks that a pipeline adds to itself while it is traced, placed as a profile says.

    Args:
        unrolled: the most attempts.
        profile: where the tasks find GPUs, memory, credentials and a cache; None where they need no such thing.
        image: the container image that the stages will have; "" for that of this version.
    """

    def __init__(self, unrolled: int, profile: Profile | None = None, image: str = ""):
        self._unrolled, self._profile = unrolled, profile or Profile()
        self._attempt = attempt_pipeline(self._profile, image)
        #: The container images of the stages, which are materials of the run.
        self.images = image_names(self._profile, image)
        #: What an hour costs, JSON; "" where the profile does not say.
        self.prices = self._profile.prices.to_json() if self._profile.prices else ""

    def fetched(self, task: dsl.PipelineTask, name: str) -> dict[str, object]:
        """Places a task that fetches the model, and returns its outputs."""
        return place(uncached(task, name), "fetch", self._profile).outputs

    def small(self, task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
        """Gives a task that does no work on a model its name, and what it needs to reach the store."""
        reach(uncached(task, name), self._profile, is_gate=name == GATE)
        return sign(task, self._profile) if name == GATE else task

    def run(self, planned: object, rollout: object, registry: object = "") -> object:
        """Adds the baseline, the attempts, the summary, the gate and the rollout.

        Args:
            planned: the state with which the baseline is measured, an output of a task.
            rollout: how to serve the release, a parameter of the pipeline.
            registry: the Model Registry to enter it in, another one.

        Returns:
            The URI of the release, an output of the gate.
        """
        measured = self._attempt(state=planned).set_display_name("baseline")
        begun = self.small(adjust(state=measured.output), "choose the first recipe")
        state = self._attempt(state=begun.output).set_display_name("attempt 1").output
        for number in range(2, self._unrolled + 1):
            decision = self.small(decide(state=state, run=RUN_ID), f"retry after attempt {number - 1}?")
            with dsl.If(decision.output == "retry", name=f"retry-{number}"):
                adjusted = self.small(adjust(state=state), "adjust the recipe")
                again = self._attempt(state=adjusted.output).set_display_name(f"attempt {number}")
            with dsl.Else(name=f"keep-{number}"):
                kept = self.small(carry(state=state), "keep the verdict")
            state = dsl.OneOf(again.output, kept.output)
        told = self.small(summarize(state=state, run=RUN_ID), "summary").outputs["Output"]
        released = self.small(gate(state=told), GATE).outputs["Output"]
        self.deliver(released, rollout, registry)
        return released

    def deliver(self, released: object, rollout: object, registry: object = "") -> None:
        """Adds the rollout of a release, and what fails the run when it was rolled back."""
        task = roll_out(release=released, rollout=rollout, run=RUN_ID, registry=registry)
        rolled = self.small(task, ROLLOUT).outputs
        with dsl.If(rolled["Output"] == "rolled_back", name="rolled-back"):
            self.small(fail_rollout(told=rolled["told"]), ROLLED_BACK)


def image_names(profile: Profile, image: str = "") -> str:
    """Returns the container images of the stages of a run."""
    return " ".join(filter(None, (image or images.CPU, profile.images.cuda, profile.images.engine)))


def offered_target(profile: Profile | None) -> str:
    """Returns the target whose name stands in the labels of the profile's GPU nodes; the processor where none does."""
    labels = " ".join(profile.gpu.node_selector.values()).lower() if profile else ""
    names = [name for name in TARGETS if all(part in labels for part in name.split("-"))]
    return max(names, key=len, default=DEFAULT_TARGET)


def offer_choices(pipeline: BaseComponent, unrolled: int, profile: Profile | None = None) -> BaseComponent:
    """Makes the run form show lists to choose from, begin with the profile's GPU, and name them and the most attempts:
    KFP's SDK has no way to say a list, and takes descriptions from docstrings alone. Nor has a parameter of KFP a
    group: they stand in the order in which people decide on them."""
    parameters = pipeline.pipeline_spec.root.input_definitions.parameters
    attempts = parameters["max_attempts"]
    attempts.description = attempts.description.replace(f"1 to {MAX_ATTEMPTS}", f"1 to {unrolled}")
    attempts.default_value.number_value = min(attempts.default_value.number_value, unrolled)
    parameters["target"].default_value.string_value = offered_target(profile)
    for name, choices in CHOICES.items():
        parameters[name].description = f"{parameters[name].description.rstrip('.')}: {', '.join(choices)}."
        for choice in choices:
            parameters[name].literals.add().string_value = choice
    return pipeline
