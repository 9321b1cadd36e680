"""The stages of an attempt: when a recipe asks for one, what it reads, what it makes, and its key in the store.

A stage whose result exists is not run again: attempts, runs and schedules share every result that their recipes share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.recipe import Distillation, MovementPruning, Recipe, Source, files
from trimtab.stages import keys
from trimtab.stages.keys import MEASURED, QUANTIZED, TENSORS, Environment
from trimtab.store.tree import Tree


@dataclass(frozen=True)
class Stage:
    """One step of an attempt.

    `work` is the function that does it, called in a child process with a folder for each name of `inputs`
    (None where the run has no such tree), `output` (an empty folder to fill), `scratch` (a folder that
    survives a kill, for checkpoints: see `checkpoints`) and `parameters`; it returns metrics, a flat JSON object.
    Raise `version` when a change of the work changes its result. `environment` says, of the stage's parameters, what of
    the image and the machine its result depends on. `keeps_metrics` puts the metrics into the tree too: a record of the
    index is no evidence, for it is bound to nothing.
    """

    name: str
    work: str
    inputs: tuple[str, ...]
    output: str
    wanted: Callable[[Recipe], bool]
    parameters: Callable[[Recipe], dict[str, Any]]
    environment: Callable[[Mapping[str, Any]], Environment]
    version: int = 1
    keeps_metrics: bool = False

    def key(
        self, parameters: Mapping[str, Any], inputs: Mapping[str, Tree | None], environment: Mapping[str, Any]
    ) -> str:
        """Returns the stage's key in the result index, 64 hex digits; `environment` as by `Environment.here`."""
        return keys.key(self.work, self.version, parameters, inputs, environment)


def always(environment: Environment) -> Callable[[Mapping[str, Any]], Environment]:
    """The environment of a stage that declares the same one, whatever its parameters."""
    return lambda parameters: environment


def _training_environment(parameters: Mapping[str, Any]) -> Environment:
    """Training with the rounding of a format rounds with ModelOpt; other students have nothing of it."""
    return QUANTIZED if "rounded" in parameters.get("weights", {}) else TENSORS


def _needs_statistics(recipe: Recipe) -> bool:
    return (recipe.prune is not None and recipe.prune.needs_statistics) or _quantize_needs("statistics")(recipe)


def _quantize_needs(what: str) -> Callable[[Recipe], bool]:
    """Whether quantization reads `what` was measured: statistics or sensitivity."""
    return lambda recipe: recipe.quantize is not None and getattr(recipe.quantize, f"needs_{what}")


def _part(name: str) -> Callable[[Recipe], dict[str, Any]]:
    """The section of the recipe that is a stage's parameters."""
    return lambda recipe: getattr(recipe, name).model_dump(mode="json")


def _calibrate(name: str, wanted: Callable[[Recipe], bool]) -> Stage:
    work = "trimtab.components.calibration.work:calibrate"
    environment = always(TENSORS)
    return Stage(name, work, ("checkpoint",), "calibration", wanted, _calibration_data, environment, version=7)


def _calibration_data(recipe: Recipe) -> dict[str, Any]:
    return files.with_files(_part("calibrate")(recipe), recipe.calibrate.sources)


def _distillation(*fields: str) -> Callable[[Recipe], dict[str, Any]]:
    """These fields of the recipe's `distill`; `text` as a list, and with what its files hold."""

    def parameters(recipe: Recipe) -> dict[str, Any]:
        chosen = recipe.distill.model_dump(mode="json", include=set(fields))
        sources = [Source(text=text) for text in recipe.distill.texts]
        return files.with_files({**chosen, "text": list(recipe.distill.texts)}, sources)

    return parameters


def _training(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `distill`, with `weights`: what other sections want of the weights while they train."""
    weights: dict[str, Any] = {}
    if isinstance(recipe.prune, MovementPruning):
        weights["movement"] = _part("prune")(recipe)
    if recipe.keeps_zeros:
        weights["keep_zeros"] = True
    if recipe.distill.quantization_aware:  # no more of it than training sees, so that recipes share a student
        fields = {"format", "group_size", "exclude"}
        weights["rounded"] = recipe.quantize.model_dump(mode="json", include=fields)
        if recipe.quantize.row.storage.inputs:
            weights["rounded_inputs"] = True
    return _distillation(*Distillation.model_fields)(recipe) | ({"weights": weights} if weights else {})


def _distills(field: str) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.distill is not None and getattr(recipe.distill, field) > 0


#: In the order of an attempt. `recalibrate` is `calibrate` on what prune and distill left: the same key, and
#: so a hit, when they left the model alone. `sensitivity` is a pass of its own over the same text, once
#: a model, for the recipes that need more than the statistics. `generate` and `teach` read the teacher
#: alone, so that a recipe that only trains otherwise finds their results.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _calibrate("calibrate", _needs_statistics),
        Stage(
            name="prune",
            work="trimtab.components.pruning.work:prune",
            inputs=("checkpoint", "calibration"),
            output="checkpoint",
            wanted=lambda recipe: recipe.prune is not None and not isinstance(recipe.prune, MovementPruning),
            parameters=_part("prune"),
            environment=always(TENSORS),
            version=8,
        ),
        Stage(
            name="generate",
            work="trimtab.components.distillation.text.generation:generate",
            inputs=("model",),
            output="generated",
            wanted=_distills("generate"),
            parameters=_distillation("text", "length", "generate", "seed"),
            environment=always(TENSORS),
            version=4,
        ),
        Stage(
            name="teach",
            work="trimtab.components.distillation.objective.teacher:teach",
            inputs=("model", "generated"),
            output="teacher_logits",
            wanted=_distills("stored_logits"),
            parameters=_distillation("text", "length", "temperature", "stored_logits"),
            environment=always(TENSORS),
            version=3,
        ),
        Stage(
            name="distill",
            work="trimtab.components.distillation.work:distill",
            inputs=("checkpoint", "model", "generated", "teacher_logits"),
            output="checkpoint",
            wanted=lambda recipe: recipe.distill is not None,
            parameters=_training,
            environment=_training_environment,
            version=8,
        ),
        _calibrate("recalibrate", _quantize_needs("statistics")),
        Stage(
            name="sensitivity",
            work="trimtab.components.quantization.mixed.sensitivity:measure",
            inputs=("checkpoint", "calibration"),
            output="sensitivity",
            wanted=_quantize_needs("sensitivity"),
            parameters=lambda recipe: {
                "formats": list(recipe.quantize.layer_formats),
                "group_size": recipe.quantize.group_size,
            },
            environment=always(QUANTIZED),
            version=6,
        ),
        Stage(
            name="quantize",
            work="trimtab.components.quantization.work:quantize",
            inputs=("checkpoint", "calibration", "sensitivity"),
            output="export",
            wanted=lambda recipe: recipe.quantize is not None,
            parameters=_part("quantize"),
            environment=always(QUANTIZED),
            version=11,
        ),
        Stage(
            name="engine",
            work="trimtab.components.engine.work:build",
            inputs=("export",),
            output="engine",
            wanted=lambda recipe: True,
            parameters=_part("engine"),
            environment=always(MEASURED),
            version=5,
        ),
    )
}

#: Tasks that run several stages: what is measured on the model that quantization gets is measured in one task, for all
#: of it needs the same checkpoint, tokens and device; and what a teacher says is for distillation alone.
_TOGETHER = {"recalibrate": ("recalibrate", "sensitivity"), "distill": ("generate", "teach", "distill")}
#: The tasks of the pipeline, and the stages that each runs.
TASKS: dict[str, tuple[str, ...]] = {
    name: _TOGETHER.get(name, (name,))
    for name in STAGES
    if not any(name in stages and name != task for task, stages in _TOGETHER.items())
}
#: The stages before distillation, in whose place there may be a student already.
MAKE_A_STUDENT = ("calibrate", "prune")


def work_stage(name: str, work: str, output: str, environment: Environment, version: int = 1) -> Stage:
    """A piece of work that a room does by itself through `cached`, outside the chain of an attempt."""
    wanted, parameters = lambda recipe: True, lambda recipe: {}
    return Stage(name, work, (), output, wanted, parameters, always(environment), version, keeps_metrics=True)
