"""The pipeline `attempt`: one recipe through all stages, without conditions inside; a loop repeats it."""

from kfp import dsl

from trimtab.components.calibration.component import calibrate
from trimtab.components.distillation.component import distill
from trimtab.components.engine.component import build_engine
from trimtab.components.pruning.component import prune
from trimtab.components.quantization.component import quantize
from trimtab.components.validation.component import validate
from trimtab.pipelines.decisions import prepare
from trimtab.pipelines.placement import machines, place, reach
from trimtab.stages import TASKS
from trimtab.stages.profile import Profile


def uncached(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    """Names a task, and turns KFP's cache off: see `trimtab.pipelines.loop`."""
    return task.set_caching_options(False).set_display_name(name)


def attempt_pipeline(profile: Profile, image: str = ""):
    """Returns the pipeline `attempt`: one recipe, its tasks placed as the profile says.

    Args:
        image: the container image of tasks for which the profile names none; "" for that of this version.
    """

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
        ready = uncached(prepare(state=state, machines=machines(profile, image)), "prepare")
        need = reach(ready, profile).outputs

        def staged(task: dsl.PipelineTask, stage: str, name: str = "") -> dict[str, object]:
            uncached(task, name or stage)
            return place(task, stage, profile, need).outputs

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
