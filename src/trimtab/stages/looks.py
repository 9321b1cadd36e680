"""What is measured of an attempt: which work, with which parameters, on which trees.

Validation measures by it, and by it the gate recomputes the key of each piece of evidence: what it judges is the
candidate, the baseline and the confirmation that the plan dealt, and nothing that was filed in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimtab.base.schema import digest
from trimtab.loop.evidence import CONFIRMATION, look_name
from trimtab.planning.dealing import Deal, Spans
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages.keys import MEASURED, QUANTIZED, Environment
from trimtab.stages.registry import STAGES, Stage, work_stage
from trimtab.store.tree import Tree

_MEASURE = "trimtab.components.validation.evaluation.measure"
EVALUATE = work_stage(
    "evaluate", f"{_MEASURE}:evaluate", "evaluation", Environment(("lm-eval",), measured=True), version=6
)
COMPARE_SPEED = work_stage("speed", f"{_MEASURE}:compare_speed", "speed", MEASURED, version=3)
#: It loads the export in the embedded engine, as far as this device can.
INTEGRITY = work_stage(
    "integrity",
    "trimtab.components.validation.integrity.gate:inspect",
    "integrity",
    Environment(QUANTIZED.libraries, measured=True),
    version=8,
)
#: What the attempt itself is asked, with the KV cache that its recipe asks for.
OWN_LOOKS = {look_name(look) for look in range(1, CONFIRMATION + 1)}
#: What is measured beside the attempt, and no part of its page.
BASELINE_LOOKS = {look_name(look, baseline=True) for look in range(1, CONFIRMATION + 1)} | {"baseline-integrity"}


@cache
def keyed_by() -> str:
    """Returns a name for the rules by which this version of trimtab makes keys: the stages, and the fields of recipes
    and evaluations. Keys that other rules made cannot be computed again."""
    rows = [*STAGES.values(), EVALUATE, COMPARE_SPEED, INTEGRITY]
    schemas = [Recipe.model_json_schema(), Evaluation.model_json_schema()]
    return digest([[stage.name, stage.work, stage.version] for stage in rows] + schemas)[:32]


@dataclass(frozen=True)
class Piece:
    """One measurement: its work, what it is called with, and the back end whose libraries shape it."""

    stage: Stage
    parameters: dict[str, Any]
    inputs: dict[str, Tree]
    backend: str


@dataclass(frozen=True)
class Subject:
    """What is measured: an attempt beside its baseline, or the baseline alone.

    `reads` is the most tokens that the model reads, `confirmations` how many attempts of the run were asked to confirm
    before this one. `baseline` and `baseline_engine` are None for the baseline's own measurements.
    """

    evaluation: Evaluation
    deal: Deal
    model: Tree
    reads: int
    recipe: Recipe
    checkpoint: Tree
    export: Tree
    engine: Tree
    calibration: Tree | None = None
    baseline: Recipe | None = None
    baseline_engine: Tree | None = None
    confirmations: int = 0

    @property
    def max_length(self) -> int:
        """The most tokens of a request: baseline and candidate are asked the same, so what is too long for one of them,
        or for the model, is cut for both."""
        recipes = (self.recipe, self.baseline) if self.baseline else (self.recipe,)
        return min(self.reads, *(recipe.engine.longest_request for recipe in recipes))

    def evaluation_of(self, look: int, baseline: bool = False, kv_cache: str = "export") -> Piece:
        """Returns what is asked at a look, or at the confirmation behind the last."""
        items, windows = self._drawn(look)
        engine, export = (self.baseline_engine, self.model) if baseline else (self.engine, self.export)
        is_baseline = self.baseline is not None and engine == self.baseline_engine
        settings = (self.baseline if is_baseline else self.recipe).engine
        speed = look == 1 and kv_cache == "export" and not settings.by_block
        parameters = evaluation_parameters(
            self.evaluation, items, windows, speed, max_length=self.max_length, kv_cache=kv_cache
        )
        inputs = {"engine": engine, "export": export}
        own_text = self.recipe.calibrate.text == "builtin"  # trimtab's tests keep it apart from the suite
        if engine == self.engine and self.calibration and not own_text:
            inputs["calibration"] = self.calibration
        return Piece(EVALUATE, parameters, inputs, settings.backend)

    def integrity(self, baseline: bool = False) -> Piece:
        """Returns what is asked of the files themselves."""
        quantize = None if baseline else self.recipe.quantize
        inputs = {"export": self.export, "checkpoint": self.checkpoint}
        if quantize and quantize.needs_statistics and self.calibration:  # then they are those of the checkpoint
            inputs["calibration"] = self.calibration
        if baseline:
            inputs = dict.fromkeys(inputs, self.model)
        return Piece(INTEGRITY, quantize.model_dump(mode="json") if quantize else {}, inputs, "torch")

    def speed(self) -> Piece:
        """Returns what is asked of both engines in turn."""
        inputs = {
            "engine": self.engine,
            "export": self.export,
            "baseline_engine": self.baseline_engine,
            "baseline_export": self.model,
        }
        is_baseline = self.engine == self.baseline_engine
        return Piece(
            COMPARE_SPEED, {"rounds": 3}, inputs, (self.baseline if is_baseline else self.recipe).engine.backend
        )

    def _drawn(self, look: int) -> tuple[Spans, list[int]]:
        if look == CONFIRMATION:
            return fresh(self.evaluation, self.deal, self.confirmations)
        return list(looks(self.evaluation, self.deal))[look - 1]


def evaluation_parameters(
    settings: Evaluation,
    items: Spans,
    windows: list[int],
    speed: bool,
    *,
    max_length: int,
    kv_cache: str = "export",
) -> dict[str, Any]:
    """Returns the parameters of `EVALUATE`, which are part of its key in the store.

    `kv_cache` "none" runs an export with its KV cache in 16 bits; the other way is no part of the key.
    """
    return {
        "tasks": list(settings.tasks),
        "task_path": settings.task_path,
        "filters": settings.filters,
        "items": items,
        "windows": windows,
        "all_windows": sum(settings.windows) + (settings.confirm_windows if settings.confirm_items else 0),
        "window_tokens": settings.window_tokens,
        "max_length": max_length,
        "heldout": settings.heldout,
        "speed": speed,
        **({} if kv_cache == "export" else {"kv_cache": kv_cache}),
    }


def looks(settings: Evaluation, deal: Deal) -> Iterator[tuple[Spans, list[int]]]:
    """Yields for each look the items of each task and the windows that it adds, as [start, stop]."""
    window = 0
    for number, windows in enumerate(settings.windows, start=1):
        yield deal.look(number), [window, window + windows]
        window += windows


def fresh(settings: Evaluation, deal: Deal, earlier: int) -> tuple[Spans, list[int]]:
    """Returns the items and windows of a confirmation, of which there were `earlier` ones in the run.

    Its items are those of no look and, as long as the tasks have enough, of no earlier confirmation; its windows, of
    which a text has few, are the same for all.
    """
    windows = sum(settings.windows)
    return deal.confirm(earlier), [windows, windows + settings.confirm_windows]
