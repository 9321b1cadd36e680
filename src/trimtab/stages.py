"""The stages of an attempt: when a recipe asks for one, what it reads, what it makes, and its key in the store.

A stage whose result exists is not run again. Its key is the digest of its name, version, parameters and input
digests, so attempts, runs and schedules share every result that their recipes share.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import child, files, progress
from trimtab.errors import Failure
from trimtab.recipe import Distillation, MovementPruning, Recipe, Source
from trimtab.schema import digest
from trimtab.state import State
from trimtab.store import Store, open_store
from trimtab.store.tree import Tree
from trimtab.verdict import Verdict

#: The state holds a reason for every attempt, and must stay small.
MAX_REASON = 300


@dataclass(frozen=True)
class Stage:
    """One step of an attempt.

    `work` is the function that does it, called in a child process with a folder for each name of `inputs`
    (None where the run has no such tree), `output` (an empty folder to fill), `scratch` (a folder that
    survives a kill on the same node, for checkpoints) and `parameters`; it returns metrics, a flat JSON object.
    Raise `version` when a change of the work changes its result.
    """

    name: str
    work: str
    inputs: tuple[str, ...]
    output: str
    wanted: Callable[[Recipe], bool]
    parameters: Callable[[Recipe], dict[str, Any]]
    version: int = 1

    def key(self, parameters: Mapping[str, Any], inputs: Mapping[str, Tree | None]) -> str:
        """Returns the stage's key in the result index, 64 hex digits."""
        digests = {name: tree.digest if tree else None for name, tree in inputs.items()}
        return digest([self.work, self.version, parameters, digests])


@dataclass(frozen=True)
class Result:
    """What a stage made: its tree, its metrics, the seconds its work took, and whether it was found ready."""

    tree: Tree
    metrics: dict[str, Any]
    seconds: float
    hit: bool


def _needs_statistics(recipe: Recipe) -> bool:
    return (recipe.prune is not None and recipe.prune.needs_statistics) or _quantize_needs("statistics")(recipe)


def _quantize_needs(what: str) -> Callable[[Recipe], bool]:
    """Whether quantization reads `what` was measured: statistics, grams or sensitivity."""
    return lambda recipe: recipe.quantize is not None and getattr(recipe.quantize, f"needs_{what}")


def _part(name: str) -> Callable[[Recipe], dict[str, Any]]:
    """The section of the recipe that is a stage's parameters."""
    return lambda recipe: getattr(recipe, name).model_dump(mode="json")


def _calibrate(name: str, wanted: Callable[[Recipe], bool]) -> Stage:
    work = "trimtab.components.calibration.work:calibrate"
    return Stage(name, work, ("checkpoint",), "calibration", wanted, _calibration_data, version=3)


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
    return _distillation(*Distillation.model_fields)(recipe) | ({"weights": weights} if weights else {})


def _distills(field: str) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.distill is not None and getattr(recipe.distill, field) > 0


#: In the order of an attempt. `recalibrate` is `calibrate` on what prune and distill left: the same key, and
#: so a hit, when they left the model alone. `gram` and `sensitivity` are passes of their own over the same text,
#: each once a model, for the recipes that need more than the statistics. `generate` and `teach` read the teacher
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
            version=3,
        ),
        Stage(
            name="generate",
            work="trimtab.components.distillation.generation:generate",
            inputs=("model",),
            output="generated",
            wanted=_distills("generate"),
            parameters=_distillation("text", "length", "generate", "seed"),
            version=2,
        ),
        Stage(
            name="teach",
            work="trimtab.components.distillation.teacher:teach",
            inputs=("model", "generated"),
            output="teacher_logits",
            wanted=_distills("stored_logits"),
            parameters=_distillation("text", "length", "temperature", "stored_logits"),
        ),
        Stage(
            name="distill",
            work="trimtab.components.distillation.work:distill",
            inputs=("checkpoint", "model", "generated", "teacher_logits"),
            output="checkpoint",
            wanted=lambda recipe: recipe.distill is not None,
            parameters=_training,
            version=3,
        ),
        _calibrate("recalibrate", _quantize_needs("statistics")),
        Stage(
            name="gram",
            work="trimtab.components.calibration.grams:measure",
            inputs=("checkpoint", "calibration"),
            output="gram",
            wanted=_quantize_needs("grams"),
            parameters=lambda recipe: {},
        ),
        Stage(
            name="sensitivity",
            work="trimtab.components.quantization.sensitivity:measure",
            inputs=("checkpoint", "calibration"),
            output="sensitivity",
            wanted=_quantize_needs("sensitivity"),
            parameters=lambda recipe: {
                "formats": list(recipe.quantize.layer_formats),
                "group_size": recipe.quantize.group_size,
            },
            version=2,
        ),
        Stage(
            name="quantize",
            work="trimtab.components.quantization.work:quantize",
            inputs=("checkpoint", "calibration", "gram", "sensitivity"),
            output="export",
            wanted=lambda recipe: recipe.quantize is not None,
            parameters=_part("quantize"),
            version=2,
        ),
        Stage(
            name="engine",
            work="trimtab.components.engine.work:build",
            inputs=("export",),
            output="engine",
            wanted=lambda recipe: True,
            parameters=_part("engine"),
            version=3,
        ),
    )
}

#: Tasks that run several stages: what is measured on the model that quantization gets is measured in one task, for all
#: of it needs the same checkpoint, tokens and device; and what a teacher says is for distillation alone.
_TOGETHER = {"recalibrate": ("recalibrate", "gram", "sensitivity"), "distill": ("generate", "teach", "distill")}
#: The tasks of the pipeline, and the stages that each runs.
TASKS: dict[str, tuple[str, ...]] = {
    name: _TOGETHER.get(name, (name,))
    for name in STAGES
    if not any(name in stages and name != task for task, stages in _TOGETHER.items())
}
#: The stages before distillation, in whose place there may be a student already.
_MAKE_A_STUDENT = ("calibrate", "prune")


def cached(
    store: Store, stage: Stage, parameters: dict[str, Any], inputs: Mapping[str, Tree | None]
) -> Result:
    """Returns the stage's result from the store, or does its work in a child process and stores it.

    The index is written after the tree, and the tree's manifest after its files: a kill at any moment leaves
    either the whole result or nothing that anyone can see.

    Raises:
        Failure: an expected failure of the work.
        StageError: infrastructure trouble.
    """
    key = stage.key(parameters, inputs)
    record = store.lookup(key)
    if record:
        return Result(Tree.model_validate(record["tree"]), record["metrics"], record["seconds"], hit=True)
    folders = {name: tree and str(store.get(tree)) for name, tree in inputs.items()}
    with tempfile.TemporaryDirectory(prefix=f"trimtab-{stage.name}-") as output:
        done = child.call(
            stage.work,
            **folders,
            output=output,
            scratch=str(_scratch(key)),
            parameters=parameters,
        )
        tree = store.put(Path(output), kind=stage.output, metadata={"key": key}, move=True)
    metrics = {**done.value, "peak_memory_bytes": done.peak_memory_bytes}
    store.record(key, {"tree": tree.model_dump(), "metrics": metrics, "seconds": done.seconds})
    return Result(tree, metrics, done.seconds, hit=False)


def work_stage(name: str, work: str, output: str, version: int = 1) -> Stage:
    """A piece of work that a room does by itself through `cached`, outside the chain of an attempt."""
    return Stage(name, work, (), output, wanted=lambda recipe: True, parameters=lambda recipe: {}, version=version)


def versions() -> dict[str, str]:
    """Returns the versions of what made and measured an artifact, for the evidence."""
    found = {"python": platform.python_version()}
    libraries = ("torch", "transformers", "nvidia-modelopt", "lm-eval", "tensorrt_llm", "tensorrt", "vllm")
    for package in ("trimtab", *libraries):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _scratch(key: str) -> Path:
    cache = os.environ.get("TRIMTAB_CACHE") or Path.home() / ".cache" / "trimtab"
    return Path(cache) / "scratch" / key


def tree_of(name: str, state: State) -> Tree | None:
    """Returns a tree of the attempt. What no stage has made yet is the model itself, or None."""
    known = {"model": state.model, "checkpoint": state.model, **state.trees}
    known.setdefault("export", known["checkpoint"])  # a recipe that does not quantize serves the checkpoint
    return known.get(name)


def _asked(stage: Stage, state: State) -> bool:
    """Whether the recipe wants the stage; what makes a student is not done where the attempt begins with one."""
    return stage.wanted(state.recipe) and not (stage.name in _MAKE_A_STUDENT and "checkpoint" in state.trees)


def inputs_of(stage: Stage, state: State) -> dict[str, Tree | None]:
    """Returns the trees that the stage reads."""
    return {name: tree_of(name, state) for name in stage.inputs}


def advance(name: str, state: State) -> tuple[State, Result | None]:
    """Takes the state through one stage. Passes it on untouched when it has a verdict or the recipe does not ask.

    An expected failure becomes the state's verdict; only infrastructure trouble raises.
    """
    stage = STAGES[name]
    if state.verdict or not _asked(stage, state):
        return state, None
    started = time.monotonic()
    try:
        store = open_store(state.store)
        result = cached(store, stage, stage.parameters(state.recipe), inputs_of(stage, state))
    except Failure as failure:
        return fail(state, name, failure), None
    progress.report(name, "found in the store" if result.hit else f"done in {time.monotonic() - started:.0f} s")
    seconds = {**state.seconds, name: 0.0 if result.hit else round(result.seconds, 1)}
    trees = {**state.trees, stage.output: result.tree}
    return state.model_copy(update={"trees": trees, "seconds": seconds}), result


def fail(state: State, name: str, failure: Failure) -> State:
    """Makes an expected failure the state's verdict."""
    progress.report(name, failure.reason)
    reason = textwrap.shorten(failure.reason, MAX_REASON, placeholder=" …")
    verdict = Verdict(outcome="rejected", failure_class=failure.failure_class, reason=reason)
    return state.model_copy(update={"verdict": verdict})


def run(names: str, state_json: str, artifact: Any, metrics: Any, shown: str = "") -> str:
    """The body of a stage's component: runs the named stages and fills the artifacts that the UI shows.

    Args:
        names: names of STAGES, separated by spaces.
        shown: the stage whose tree the artifact stands for; the first when empty. The names of the others' metrics
            begin with their stage's, for all have seconds.
        state_json: the state as the previous stage returned it.
        artifact: KFP output artifact; gets a few kB that name the tree, so that the UI draws the lineage.
        metrics: KFP Metrics artifact, or None.

    Returns:
        The state for the next stage, as JSON.
    """
    child.follow_run()
    state = State.parse(state_json)
    shown = shown or names.split()[0]
    for name in names.split():
        state, result = advance(name, state)
        if metrics is not None and result:
            told = {**result.metrics, "seconds": result.seconds, "from_store": float(result.hit)}
            log_metrics(metrics, {key if name == shown else f"{name}_{key}": value for key, value in told.items()})
    describe_tree(artifact, tree_of(STAGES[shown].output, state))
    return state.to_json()


def log_metrics(artifact: Any, metrics: Mapping[str, Any]) -> None:
    """Shows the numbers among the metrics in the UI; texts have no place in KFP's Metrics."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            artifact.log_metric(name, round(float(value), 6))


def describe_tree(artifact: Any, tree: Tree | None) -> None:
    """Writes what the artifact stands for: the tree stays in the store, its name travels through KFP.

    The artifact's own URI is left alone: outside the pipeline root KFP's launcher fails the task.
    """
    facts = tree.model_dump() if tree else {}
    Path(artifact.path).write_text(json.dumps(facts), encoding="utf-8")
    artifact.metadata.update({f"tree_{name}": value for name, value in facts.items()})


def accelerators(state: State) -> dict[str, str]:
    """Returns for each of TASKS the accelerators it needs, as KFP wants the count.

    That is the most that any of its stages needs: "0" where each is a pass-through or a hit. Follows the chain of keys
    through the index as far as results exist; behind the first missing one every wanted stage must run.
    """
    counts = dict.fromkeys(STAGES, 0)
    if not state.verdict and state.target != "cpu":
        counts |= _needed(state)
    return {task: str(max(counts[name] for name in names)) for task, names in TASKS.items()}


def _needed(state: State) -> dict[str, int]:
    """The accelerators of the stages that must run."""
    several = {"engine": state.recipe.engine.world_size}
    if state.recipe.distill:
        several["distill"] = state.recipe.distill.processes
    store, known, counts = open_store(state.store), True, {}
    for name, stage in STAGES.items():
        if not _asked(stage, state):
            continue
        record = known and store.lookup(stage.key(stage.parameters(state.recipe), inputs_of(stage, state)))
        if record:
            trees = {**state.trees, stage.output: Tree.model_validate(record["tree"])}
            state = state.model_copy(update={"trees": trees})
        else:
            known = False
            counts[name] = several.get(name, 1)
    return counts
