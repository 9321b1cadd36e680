"""The looks: measure a little, judge, and measure more only while the verdict is open."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import child, evidence, flow, hardware, memory, progress, report, stages, verdict
from trimtab.errors import Failure
from trimtab.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.state import Brief, Evaluation, State
from trimtab.statistics import wilson
from trimtab.store import Store, open_store
from trimtab.store.tree import Tree
from trimtab.verdict import Measurements, Verdict

SPEED_GOALS = ("lower_latency", "higher_throughput", "lower_cost")

_MEASURE = "trimtab.components.validation.measure"
EVALUATE = stages.work_stage("evaluate", f"{_MEASURE}:evaluate", "evaluation", version=2)
COMPARE_SPEED = stages.work_stage("speed", f"{_MEASURE}:compare_speed", "speed")
INTEGRITY = stages.work_stage(
    "integrity", "trimtab.components.validation.integrity:inspect", "integrity", version=4
)
#: What is measured beside the attempt, and no part of its page.
_BASELINE_LOOKS = {look_name(look, baseline=True) for look in range(1, CONFIRMATION + 1)}


def run(state_json: str, page: Any, metrics: Any) -> str:
    """Judges the attempt, writes its page, and files it in the state's history.

    Args:
        state_json: the state as the engine stage left it; a verdict that is set already is kept.
        page: KFP HTML artifact.
        metrics: KFP Metrics artifact.

    Returns:
        The state with the verdict; the attempt is part of `baseline` (attempt 0) or of `history`.
    """
    child.follow_run()
    state = State.parse(state_json)
    if state.attempt == 0 and state.baseline or len(state.history) >= state.attempt > 0:
        return state_json  # the baseline failed, so this attempt never began
    store = open_store(state.store)
    judge = _Judge(store, state)
    try:
        result = state.verdict or judge.verdict()
    except Failure as failure:
        state = stages.fail(state, "validate", failure)
        result = state.verdict
    filed_evidence = None
    if result.outcome == "accepted":
        filed_evidence = evidence.write(store, state, result, judge.export, judge.trees, stages.versions())
    seconds = {**state.seconds, "validate": round(judge.seconds, 1)}
    brief = Brief(
        recipe=state.recipe,
        why=state.why,
        verdict=result,
        seconds=seconds,
        evaluation=filed_evidence,
        engine=state.trees.get("engine") if result.outcome in ("baseline", "accepted") else None,
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
    return _filed(state, result).to_json()


def _filed(state: State, result: Verdict) -> State:
    """Drops what is in the attempt's brief and in its evidence: the state must stay small."""
    verdict = Verdict(outcome=result.outcome, failure_class=result.failure_class, reason=result.reason)
    artifact = {name: tree for name, tree in state.trees.items() if name in ("checkpoint", "export")}
    return state.model_copy(update={"trees": artifact, "seconds": {}, "verdict": verdict})


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
        for look, (items, windows) in enumerate(ranges(self.state.evaluation), start=1):
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
        items, windows = next(ranges(self.state.evaluation))
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

    def _look(self, look: int, items: list[int], windows: list[int]) -> tuple[stages.Result, stages.Result]:
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
        items: list[int],
        windows: list[int],
        speed: bool,
        kv_cache: str = "export",
    ) -> stages.Result:
        parameters = evaluation_parameters(self.state.evaluation, items, windows, speed, kv_cache)
        inputs = {"engine": engine, "export": export}
        calibration = self.state.trees.get("calibration")
        own_text = self.state.recipe.calibrate.text == "builtin"  # trimtab's tests keep it apart from the suite
        if engine == self.engine and calibration and not own_text:
            inputs["calibration"] = calibration
        return self._cached(name, EVALUATE, parameters, inputs)

    def _cached(
        self, name: str, stage: stages.Stage, parameters: dict[str, Any], inputs: dict[str, Tree]
    ) -> stages.Result:
        result = stages.cached(self.store, stage, parameters, inputs)
        self.trees[name] = result.tree
        self.seconds += 0.0 if result.hit else result.seconds
        return result

    def _measurements(self, integrity: dict[str, Any], measured: dict[str, Any]) -> Measurements:
        facts, machine = flow.facts_of(self.store, self.state.model), hardware.target(self.state.target)
        return Measurements(
            bytes=integrity["bytes"],
            quantized_share=round(integrity["quantized_share"], 4),
            decode_tokens_per_second=round(measured["decode_tokens_per_second"], 2),
            throughput_tokens_per_second=round(measured["throughput_tokens_per_second"], 2),
            peak_memory_bytes=measured["peak_memory_bytes"],
            max_context_tokens=memory.max_context_tokens(facts, self.state.recipe, machine, integrity["bytes"]),
        )

    def _refuse_degenerate(self, baseline: dict[str, Any], candidate: dict[str, Any]) -> None:
        """A model whose own text goes round in a loop cannot be blamed for it; one that began to can."""
        if candidate["degenerate"] > 0.5 >= baseline["degenerate"]:
            share = f"{candidate['degenerate']:.0%}"
            raise Failure("degenerate_output", f"{share} of the continuations are empty or repeat themselves")

    def _check_gain(self, result: Verdict, measured: Measurements) -> Verdict:
        base = self.state.baseline.verdict.measurements
        if self.state.goal in SPEED_GOALS:
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
        return verdict.check_gain(result, self.state.goal, self.state.recipe.accept, base, measured)

    def _confirm(self, result: Verdict) -> Verdict:
        settings = self.state.evaluation
        if not settings.confirm_items:
            return result
        self._look(CONFIRMATION, *fresh_range(settings))
        return evidence.confirm(self.store, self.trees, self.state.recipe, result, self.state.max_attempts)

    def _judge_kv_cache_apart(self, result: Verdict) -> Verdict:
        """Asks, where the attempt fell short, whether the same export would pass with its KV cache in 16 bits.

        It answers what was drawn already, nothing else, and is judged look by look as the attempt was.
        """
        recipe = self.state.recipe
        kv_cache = recipe.kv_cache_format
        told = result.failure_class in verdict.KV_CACHE_SUSPECT and result.recovery is not None
        if kv_cache == "none" or not told or recipe.engine.backend not in hardware.SWITCHES_KV_CACHE:
            return result
        progress.report("validate", f"{result.outcome}, {result.reason}; measuring without the {kv_cache} KV cache")
        try:
            apart = self._without_kv_cache(result)
        except Failure as failure:  # the verdict stands on what was measured before
            reason = f"{result.reason}; the KV cache could not be judged apart: {failure.reason}"
            return result.model_copy(update={"reason": textwrap.shorten(reason, stages.MAX_REASON, placeholder=" …")})
        return verdict.blame_kv_cache(result, kv_cache, apart)

    def _without_kv_cache(self, result: Verdict) -> Verdict:
        def measure(look: int, items: list[int], windows: list[int]) -> None:
            name = look_name(look, kv_cache="none")
            self._evaluate(name, self.engine, self.export, items, windows, speed=False, kv_cache="none")

        recipe = self.state.recipe
        for look, drawn in enumerate(islice(ranges(self.state.evaluation), result.looks), start=1):
            measure(look, *drawn)
            apart = evidence.judge_looks(self.store, self.trees, recipe, look, kv_cache="none")
            if apart.outcome != "indeterminate":
                break
        if apart.outcome == "accepted" and result.confirmation:
            measure(CONFIRMATION, *fresh_range(self.state.evaluation))
            attempts = self.state.max_attempts
            apart = evidence.confirm(self.store, self.trees, recipe, apart, attempts, kv_cache="none")
        return apart

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
    settings: Evaluation, items: list[int], windows: list[int], speed: bool, kv_cache: str = "export"
) -> dict[str, Any]:
    """Returns the parameters of `EVALUATE`, which are part of its key in the store.

    `kv_cache` "none" runs an export with its KV cache in 16 bits; the other way is no part of the key, so that
    results from before there was a choice are found.
    """
    return {
        "tasks": list(settings.tasks),
        "task_path": settings.task_path,
        "items": items,
        "windows": windows,
        "window_tokens": settings.window_tokens,
        "heldout": settings.heldout,
        "speed": speed,
        **({} if kv_cache == "export" else {"kv_cache": kv_cache}),
    }


def ranges(settings: Evaluation) -> Iterator[tuple[list[int], list[int]]]:
    """Yields for each look the items and windows that it adds, as [start, stop]."""
    item = window = 0
    for items, windows in zip(settings.items, settings.windows, strict=True):
        yield [item, item + items], [window, window + windows]
        item, window = item + items, window + windows


def fresh_range(settings: Evaluation) -> tuple[list[int], list[int]]:
    """Returns the items and windows of the confirmation: those behind the last look's."""
    items, windows = sum(settings.items), sum(settings.windows)
    return [items, items + settings.confirm_items], [windows, windows + settings.confirm_windows]


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
