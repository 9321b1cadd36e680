"""The looks: measure a little, judge, and measure more only while the verdict is open."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import judge, stages
from trimtab.base import child, progress
from trimtab.base.errors import Failure
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.goals import GOALS
from trimtab.components.validation.looks import (
    COMPARE_SPEED,
    EVALUATE,
    INTEGRITY,
    OWN_LOOKS,
    evaluation_parameters,
    fresh,
    looks,
)
from trimtab.components.validation.page import html, numbers
from trimtab.judge import Measurements, Verdict
from trimtab.judge.statistics import wilson
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.loop.state import Brief, State, fail
from trimtab.model import hardware, memory
from trimtab.planning.dealing import Deal, Spans
from trimtab.store import Store, open_store
from trimtab.store.tree import Tree


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
    result = result.model_copy(update={"truncated": judge.truncated})
    state = state.model_copy(update={"verdict": result})
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
    Path(page.path).write_text(html(store, state, judge.trees), encoding="utf-8")
    stages.log_metrics(metrics, numbers(result))
    progress.report("validate", f"{result.outcome}: {result.reason}")
    return save(state)


class _Judge:
    """Measures candidate and baseline on the same items and asks for a verdict."""

    def __init__(self, store: Store, state: State):
        self.store, self.state = store, state
        self.seconds = 0.0
        self.truncated = 0  # requests to the attempt that lost their beginning
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
            self.truncated += cut if name in OWN_LOOKS else 0
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


def _with_speed(measured: Measurements, speed: dict[str, float], prefix: str) -> Measurements:
    names = ("decode_tokens_per_second", "throughput_tokens_per_second")
    return measured.model_copy(update={name: round(speed[prefix + name], 2) for name in names})
