"""The looks: measure a little, judge, and measure more only while the verdict is open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import judge, report, stages
from trimtab.base import child, progress
from trimtab.base.errors import Failure
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.goals import GOALS
from trimtab.judge import Measurements, Verdict
from trimtab.judge.statistics import wilson
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.loop.state import Brief, State, fail
from trimtab.model import hardware, memory
from trimtab.plan.dealing import Deal, Spans
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import Store, open_store
from trimtab.store.tree import Tree

_MEASURE = "trimtab.components.validation.evaluation.measure"
EVALUATE = stages.work_stage(
    "evaluate", f"{_MEASURE}:evaluate", "evaluation", stages.Environment(("lm-eval",), measured=True), version=2
)
COMPARE_SPEED = stages.work_stage("speed", f"{_MEASURE}:compare_speed", "speed", stages.MEASURED, version=2)
#: It loads the export in the embedded engine, as far as this device can.
INTEGRITY = stages.work_stage(
    "integrity",
    "trimtab.components.validation.integrity.gate:inspect",
    "integrity",
    stages.Environment(stages.QUANTIZED.libraries, measured=True),
    version=4,
)
#: What is measured beside the attempt, and no part of its page.
_BASELINE_LOOKS = {look_name(look, baseline=True) for look in range(1, CONFIRMATION + 1)}


def run(state_uri: str, page: Any, metrics: Any) -> str:
    """Judges the attempt, writes its page, and files it in the state's history.

    Args:
        state_uri: the document of the attempt as the engine stage left it; a verdict that is set already is kept.
        page: KFP HTML artifact.
        metrics: KFP Metrics artifact.

    Returns:
        The URI of the attempt's document with the verdict.
    """
    child.follow_run()
    state = load(state_uri)
    if state.is_over:
        return state_uri  # the baseline failed, so this attempt never began
    store = open_store(state.store)
    judge = _Judge(store, state)
    try:
        result = state.verdict or judge.verdict()
    except Failure as failure:
        state = fail(state, "validate", failure)
        result = state.verdict
    filed_evidence = None
    if result.outcome == "accepted":
        filed_evidence = evidence.write(store, state, result, judge.export, judge.trees)
    seconds = {**state.seconds, "validate": round(judge.seconds, 1)}
    brief = Brief(
        recipe=state.recipe,
        why=state.why,
        verdict=result,
        seconds=seconds,
        evaluation=filed_evidence,
        engine=state.trees.get("engine"),
    )
    filed = {"baseline": brief} if state.attempt == 0 else {"history": (*state.history, brief)}
    state = state.model_copy(update={"verdict": result, "seconds": seconds, **filed})
    shown = report.attempt_html(
        state,
        kernels=judge.read("kernels.json"),
        layers=judge.read("layers.json"),
        calibration=judge.read("calibration.json"),
        reload=judge.read("reload.json"),
        distillation=judge.distillation(),
    )
    Path(page.path).write_text(shown, encoding="utf-8")
    stages.log_metrics(metrics, _numbers(result))
    progress.report("validate", f"{result.outcome}: {result.reason}")
    return save(state)


class _Judge:
    """Measures candidate and baseline on the same items and asks for a verdict."""

    def __init__(self, store: Store, state: State):
        self.store, self.state = store, state
        self.seconds = 0.0
        self.trees: dict[str, Tree] = {}  # what was measured, for the evidence
        self.engine = state.trees.get("engine")
        self.export = stages.tree_of("export", state)

    def verdict(self) -> Verdict:
        if self.state.attempt == 0:
            return self._baseline()
        integrity = self._cached(
            "integrity",
            INTEGRITY,
            self.state.recipe.quantize.model_dump(mode="json") if self.state.recipe.quantize else {},
            {
                "export": self.export,
                "checkpoint": stages.tree_of("checkpoint", self.state),
            },
        )
        if skipped := integrity.metrics.get("reload_skipped"):
            progress.report("validate", f"the text of this export is not checked: the embedded engine says {skipped}")
        recipe = self.state.recipe
        for look, (items, windows) in enumerate(looks(self.state.evaluation, self.deal), start=1):
            baseline, candidate = self._look(look, items, windows)
            if look == 1:
                measured = self._measurements(integrity.metrics, candidate.metrics)
                self._refuse_degenerate(baseline.metrics, candidate.metrics)
            result = evidence.judge_looks(self.store, self.trees, recipe, look)
            result = result.model_copy(update={"measurements": measured})
            progress.report("validate", f"look {look} of {LOOKS}: {result.outcome}, {result.reason}")
            if result.outcome != "indeterminate":
                break
        if result.outcome == "accepted":
            result = self._check_gain(result, measured)
        if result.outcome == "accepted":
            result = self._confirm(result)
        return self._judge_kv_cache_apart(result)

    def _baseline(self) -> Verdict:
        items, windows = next(looks(self.state.evaluation, self.deal))
        result = self._evaluate(look_name(1), self.engine, self.export, items, windows, speed=True)
        scores = evidence.read_scores(self.store, [result.tree])
        integrity = self._cached(
            "integrity", INTEGRITY, {}, {"export": self.export, "checkpoint": self.state.model}
        )
        return Verdict(
            outcome="baseline",
            reason="the model unchanged, which every attempt is compared with",
            looks=1,
            items=len(scores.items),
            windows=len(scores.nll),
            accuracy=wilson(scores.items.sum(), len(scores.items), self.state.recipe.accept.confidence),
            perplexity=float(np.exp(scores.nll.sum() / scores.tokens.sum())),
            measurements=self._measurements(integrity.metrics, result.metrics),
        )

    def _look(self, look: int, items: Spans, windows: list[int]) -> tuple[stages.Result, stages.Result]:
        base = self.state.baseline
        baseline = self._evaluate(
            look_name(look, baseline=True), base.engine, self.state.model, items, windows, speed=look == 1
        )
        return baseline, self._evaluate(
            look_name(look), self.engine, self.export, items, windows, speed=look == 1
        )

    def _evaluate(
        self,
        name: str,
        engine: Tree,
        export: Tree,
        items: Spans,
        windows: list[int],
        speed: bool,
        kv_cache: str = "export",
    ) -> stages.Result:
        parameters = evaluation_parameters(
            self.state.evaluation, items, windows, speed, max_length=self.max_length, kv_cache=kv_cache
        )
        inputs = {"engine": engine, "export": export}
        calibration = self.state.trees.get("calibration")
        own_text = self.state.recipe.calibrate.text == "builtin"  # trimtab's tests keep it apart from the suite
        if engine == self.engine and calibration and not own_text:
            inputs["calibration"] = calibration
        result = self._cached(name, EVALUATE, parameters, inputs)
        if cut := result.metrics.get("truncated"):
            what = f"{cut} requests were too long for the engine and lost their beginning, as in lm-eval"
            progress.report("validate", what)
        return result

    @property
    def max_length(self) -> int:
        """The most tokens of a request: baseline and candidate are asked the same, so what is too long for one of them,
        or for the model, is cut for both."""
        recipes = [self.state.recipe, *([self.state.baseline.recipe] if self.state.baseline else [])]
        reads = decisions.facts_of(self.store, self.state.model).max_position_embeddings
        return min(reads, *(recipe.engine.longest_request for recipe in recipes))

    def _cached(
        self, name: str, stage: stages.Stage, parameters: dict[str, Any], inputs: dict[str, Tree]
    ) -> stages.Result:
        recipe, base = self.state.recipe, self.state.baseline
        if base and inputs.get("engine") == base.engine:
            recipe = base.recipe
        backend = "torch" if stage is INTEGRITY else recipe.engine.backend
        result = stages.cached(self.store, stage, parameters, inputs, backend)
        self.trees[name] = result.tree
        self.seconds += 0.0 if result.hit else result.seconds
        return result

    def _measurements(self, integrity: dict[str, Any], measured: dict[str, Any]) -> Measurements:
        facts, machine = decisions.facts_of(self.store, self.state.model), hardware.target(self.state.target)
        return Measurements(
            bytes=integrity["bytes"],
            quantized_share=round(integrity["quantized_share"], 4),
            decode_tokens_per_second=round(measured["decode_tokens_per_second"], 2),
            throughput_tokens_per_second=round(measured["throughput_tokens_per_second"], 2),
            peak_memory_bytes=measured["peak_memory_bytes"],
            max_context_tokens=memory.max_context_tokens(facts, self.state.recipe, machine, integrity["bytes"]),
            devices=self.state.recipe.engine.world_size,
            batch=self.state.recipe.engine.max_batch_size,
        )

    def _refuse_degenerate(self, baseline: dict[str, Any], candidate: dict[str, Any]) -> None:
        """A model whose own text goes round in a loop cannot be blamed for it; one that began to can."""
        if candidate["degenerate"] > 0.5 >= baseline["degenerate"]:
            share = f"{candidate['degenerate']:.0%}"
            raise Failure("degenerate_output", f"{share} of the continuations are empty or repeat themselves")

    def _check_gain(self, result: Verdict, measured: Measurements) -> Verdict:
        base = self.state.baseline.verdict.measurements
        if GOALS[self.state.goal].measure.timed:
            speed = self._cached(
                "speed",
                COMPARE_SPEED,
                {"rounds": 3},
                {
                    "engine": self.engine,
                    "export": self.export,
                    "baseline_engine": self.state.baseline.engine,
                    "baseline_export": self.state.model,
                },
            ).metrics
            measured = _with_speed(measured, speed, "")
            base = _with_speed(base, speed, "baseline_")
        return judge.check_gain(result, self.state.goal, self.state.recipe.accept, base, measured)

    def _confirm(self, result: Verdict) -> Verdict:
        settings = self.state.evaluation
        if not settings.confirm_items:
            return result
        if again := self.deal.asked_again(self._confirmations):
            progress.report("validate", f"items of {', '.join(again)} have confirmed an earlier attempt too")
        self._look(CONFIRMATION, *fresh(settings, self.deal, self._confirmations))
        return evidence.confirm(self.store, self.trees, self.state.recipe, result, self.state.max_attempts)

    def _judge_kv_cache_apart(self, result: Verdict) -> Verdict:
        """Asks, where the attempt fell short, whether the same export would pass with its KV cache in 16 bits.

        It answers what was drawn already, nothing else, and is judged look by look as the attempt was.
        """
        recipe = self.state.recipe
        kv_cache = recipe.kv_cache_format
        told = result.failure_class in judge.KV_CACHE_SUSPECT and result.recovery is not None
        if kv_cache == "none" or not told or not BACKENDS[recipe.engine.backend].switches_kv_cache:
            return result
        progress.report("validate", f"{result.outcome}, {result.reason}; measuring without the {kv_cache} KV cache")
        try:
            apart = self._without_kv_cache(result)
        except Failure as failure:  # the verdict stands on what was measured before
            reason = f"{result.reason}; the KV cache could not be judged apart: {failure.reason}"
            return result.model_copy(update={"reason": reason})
        return judge.blame_kv_cache(result, kv_cache, apart)

    def _without_kv_cache(self, result: Verdict) -> Verdict:
        def measure(look: int, items: Spans, windows: list[int]) -> None:
            name = look_name(look, kv_cache="none")
            self._evaluate(name, self.engine, self.export, items, windows, speed=False, kv_cache="none")

        recipe = self.state.recipe
        for look, drawn in enumerate(islice(looks(self.state.evaluation, self.deal), result.looks), start=1):
            measure(look, *drawn)
            apart = evidence.judge_looks(self.store, self.trees, recipe, look, kv_cache="none")
            if apart.outcome != "indeterminate":
                break
        if apart.outcome == "accepted" and result.confirmation:
            measure(CONFIRMATION, *fresh(self.state.evaluation, self.deal, self._confirmations))
            attempts = self.state.max_attempts
            apart = evidence.confirm(self.store, self.trees, recipe, apart, attempts, kv_cache="none")
        return apart

    @cached_property
    def deal(self) -> Deal:
        """Which items are asked when, as the plan has it."""
        return read_plan(self.store, self.state.plan).dealt

    @property
    def _confirmations(self) -> int:
        """How many attempts before this one were asked to confirm."""
        return sum(brief.verdict.confirmation is not None for brief in self.state.history)

    def read(self, name: str) -> Any:
        """Returns a JSON file of what was measured on this attempt or calibrated on, for the page, or None."""
        calibration = self.state.trees.get("calibration")
        own = [tree for look, tree in self.trees.items() if look not in _BASELINE_LOOKS]
        for tree in (*own, *([calibration] if calibration else [])):
            path = self.store.get(tree) / name
            if path.exists():
                return json.loads(path.read_text(encoding="utf-8"))
        return None

    def distillation(self) -> dict[str, Any] | None:
        """Returns the metrics of this attempt's training, for the page; its tree, a whole model, stays where it is."""
        checkpoint = self.state.trees.get("checkpoint")
        if checkpoint is None or "distill" not in self.state.seconds:  # it may be an earlier run's student
            return None
        record = self.store.lookup(self.store.manifest(checkpoint).metadata["key"])
        return record["metrics"] if record and "curve" in record["metrics"] else None


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


def _with_speed(measured: Measurements, speed: dict[str, float], prefix: str) -> Measurements:
    names = ("decode_tokens_per_second", "throughput_tokens_per_second")
    return measured.model_copy(update={name: round(speed[prefix + name], 2) for name in names})


def _numbers(result: Verdict) -> dict[str, Any]:
    numbers: dict[str, Any] = {"accepted": float(result.outcome == "accepted"), "items": result.items}
    numbers |= result.measurements.model_dump()
    if result.accuracy:
        numbers["accuracy"] = result.accuracy.estimate
    if result.perplexity:
        numbers["perplexity"] = result.perplexity
    if result.recovery and result.perplexity_ratio:
        numbers |= {
            "recovery": result.recovery.estimate,
            "perplexity_ratio": result.perplexity_ratio.estimate,
        }
    return numbers
