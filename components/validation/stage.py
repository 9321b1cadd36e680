"""The looks: measure a little, judge, and measure more only while the verdict is open."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import judge, stages
from trimtab.base import child, progress, signing
from trimtab.base.errors import Failure
from trimtab.base.session import Session
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.goals import GOALS
from trimtab.components.validation.page import html, numbers
from trimtab.judge import Measurements, Scores, Verdict
from trimtab.judge.power import Power
from trimtab.judge.statistics import wilson
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.loop.state import Brief, State, fail
from trimtab.planning import drawing
from trimtab.planning.resources import Resources
from trimtab.recipe import Recipe
from trimtab.stages import usage
from trimtab.stages.looks import OWN_LOOKS, Piece, Subject, keyed_by
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
    finally:
        judge.session.close()
    result = result.model_copy(update={"truncated": judge.truncated})
    state = state.model_copy(update={"verdict": result})
    filed_evidence = None
    if result.outcome == "accepted":
        public = signing.to_pem(judge.signer.public_key) if judge.signer else ""
        filed_evidence = evidence.write(
            store, state, result, judge.export, judge.trees, judge.signatures, public, keyed_by()
        )
    seconds = {**state.seconds, "validate": round(judge.seconds, 1)}
    used = {**state.used, **({"validate": judge.used} if judge.used else {})}
    busy = {**state.cpu_seconds, "validate": round(judge.cpu_seconds, 1)}
    brief = Brief(
        recipe=state.recipe,
        why=state.why,
        verdict=result,
        seconds=seconds,
        used=used,
        cpu_seconds=busy,
        evaluation=filed_evidence,
        engine=state.trees.get("engine"),
    )
    filed = {"baseline": brief} if state.attempt == 0 else {"history": (*state.history, brief)}
    spent = {"seconds": seconds, "cpu_seconds": busy, "used": used}
    state = state.model_copy(update={"verdict": result, **spent, **filed})
    Path(page.path).write_text(html(store, state, judge.trees), encoding="utf-8")
    stages.log_metrics(metrics, numbers(result))
    progress.report("validate", f"{result.outcome}: {result.reason}")
    return save(state)


class _Judge:
    """Measures candidate and baseline on the same items and asks for a verdict."""

    def __init__(self, store: Store, state: State):
        self.store, self.state = store, state
        self.session = Session()  # in which an engine stays from look to look
        self.signer = signing.validation_signer()
        self.seconds = self.cpu_seconds = 0.0
        self.used: Resources | None = None
        self.truncated = 0  # requests to the attempt that lost their beginning
        self.trees: dict[str, Tree] = {}  # what was measured, for the evidence
        self.signatures: dict[str, Any] = {}
        self.export = stages.tree_of("export", state)

    def verdict(self) -> Verdict:
        if self.state.attempt == 0:
            return self._baseline()
        integrity = self._measure("integrity", self.subject.integrity())
        if skipped := integrity.metrics.get("reload_skipped"):
            progress.report("validate", f"the text of this export is not checked: the embedded engine says {skipped}")
        recipe = self.state.recipe
        for look in range(1, LOOKS + 1):
            baseline, candidate = self._look(look)
            if look == 1:
                measured = self._measurements(recipe, integrity, candidate)
                if wrong := evidence.began_to_repeat(baseline.metrics, candidate.metrics):
                    raise Failure("degenerate_output", wrong)
                first = baseline
            result = evidence.judge_looks(self.store, self.trees, recipe, look)
            result = result.model_copy(update={"measurements": measured})
            progress.report("validate", f"look {look} of {LOOKS}: {result.outcome}, {result.reason}")
            if result.outcome != "indeterminate":
                break
        if result.outcome == "accepted":
            result = self._check_gain(result, first, measured)
        if result.outcome == "accepted":
            result = self._confirm(result)
        return self._judge_kv_cache_apart(result)

    def _baseline(self) -> Verdict:
        result = self._measure(look_name(1), self.subject.evaluation_of(1))
        scores = evidence.read_scores(self.store, [result.tree])
        integrity = self._measure("integrity", self.subject.integrity())
        power = self._power(scores)
        progress.report("validate", power.sentence)
        hopeless = {
            "outcome": "indeterminate",
            "failure_class": "accuracy",
            "reason": f"nothing is tried, because these items cannot decide: {power.sentence}; name more tasks or "
            "larger ones, or write a lower limit (evaluation.power: 0 tries all the same)",
        }
        filed = {"outcome": "baseline", "reason": "the model unchanged, which every attempt is compared with"}
        if self.state.recipe.engine.by_block:
            filed["reason"] += "; speed and memory not measured: scored block by block, for nothing there holds it"
        return Verdict(
            **(filed if power.decides or not power.wanted else hopeless),
            looks=1,
            items=len(scores.items),
            windows=len(scores.nll),
            accuracy=wilson(scores.items.sum(), len(scores.items), self.state.recipe.accept.confidence),
            perplexity=float(np.exp(scores.nll.sum() / scores.tokens.sum())),
            power=power,
            measurements=self._measurements(self.state.recipe, integrity, result),
        )

    def _power(self, scores: Scores) -> Power:
        """Returns what the items can show, with those that the run will draw besides."""
        plan = read_plan(self.store, self.state.plan)
        about = (self.state.evaluation, decisions.accepted_by(plan), self.state.max_attempts)
        power = drawing.measured(scores, plan.dealt, *about)
        return drawing.measured(scores, decisions.drawn(plan, power), *about)

    def _look(self, look: int) -> tuple[stages.Result, stages.Result]:
        baseline = self._measure(look_name(look, baseline=True), self.subject.evaluation_of(look, baseline=True))
        return baseline, self._measure(look_name(look), self.subject.evaluation_of(look))

    def _measure(self, name: str, piece: Piece) -> stages.Result:
        asked = piece.stage, piece.parameters, piece.inputs, piece.backend
        result = stages.cached(self.store, *asked, self.signer, self.session.call)
        self.trees[name] = result.tree
        if result.signature:
            self.signatures[name] = result.signature
        self.seconds += 0.0 if result.hit else result.seconds
        self.used = usage.together(self.used, usage.used(result.metrics, result.seconds))
        self.cpu_seconds += 0.0 if result.hit else result.metrics.get("cpu_seconds", 0.0)
        if cut := result.metrics.get("truncated"):
            self.truncated += cut if name in OWN_LOOKS else 0
            what = f"{cut} requests were too long for the engine and lost their beginning, as in lm-eval"
            progress.report("validate", what)
        return result

    def _measurements(self, recipe: Recipe, integrity: stages.Result, look: stages.Result) -> Measurements:
        facts = decisions.facts_of(self.store, self.state.model)
        return evidence.measurements(facts, recipe, self.state.target, integrity.metrics, look.metrics)

    def _check_gain(self, result: Verdict, first: stages.Result, measured: Measurements) -> Verdict:
        files = self._measure("baseline-integrity", self.subject.integrity(baseline=True))
        base = self._measurements(self.subject.baseline, files, first)
        if GOALS[self.state.goal].measure.timed:
            speed = self._measure("speed", self.subject.speed()).metrics
            measured = evidence.with_speed(measured, speed)
            base = evidence.with_speed(base, speed, baseline=True)
        return judge.check_gain(result, self.state.goal, self.state.recipe.accept, base, measured)

    def _confirm(self, result: Verdict) -> Verdict:
        if not self.state.evaluation.confirm_items:
            return result
        if again := self.subject.deal.asked_again(self.subject.confirmations):
            progress.report("validate", f"items of {', '.join(again)} have confirmed an earlier attempt too")
        self._look(CONFIRMATION)
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
        def measure(look: int) -> None:
            self._measure(look_name(look, kv_cache="none"), self.subject.evaluation_of(look, kv_cache="none"))

        recipe = self.state.recipe
        for look in range(1, result.looks + 1):
            measure(look)
            apart = evidence.judge_looks(self.store, self.trees, recipe, look, kv_cache="none")
            if apart.outcome != "indeterminate":
                break
        if apart.outcome == "accepted" and result.confirmation:
            measure(CONFIRMATION)
            attempts = self.state.max_attempts
            apart = evidence.confirm(self.store, self.trees, recipe, apart, attempts, kv_cache="none")
        return apart

    @cached_property
    def subject(self) -> Subject:
        """What is measured."""
        state = self.state
        baseline = state.baseline if state.attempt else None
        return Subject(
            evaluation=state.evaluation,
            deal=read_plan(self.store, state.plan).dealt,
            model=state.model,
            reads=decisions.facts_of(self.store, state.model).max_position_embeddings,
            recipe=state.recipe,
            checkpoint=stages.tree_of("checkpoint", state),
            export=self.export,
            engine=state.trees.get("engine"),
            calibration=state.trees.get("calibration"),
            baseline=baseline and baseline.recipe,
            baseline_engine=baseline and baseline.engine,
            confirmations=evidence.confirmations(state),
        )
