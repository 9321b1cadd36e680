"""Judges an accepted attempt anew, from what is stored, and believes nothing that is said of it.

Each piece of evidence must be the result of the very measurement that the plan dealt: its key, which stands in its
manifest, is computed again from the plan, the recipe and the trees that were measured. So a candidate is not its own
baseline, items are not chosen afterwards, and a confirmation is not left out. The gate does so by the rules of its own
version alone. Who verifies a release by a later version, which makes keys by other rules, judges the answers anew and
has the gate's word, which it signed, for what they are answers to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from trimtab import judge
from trimtab.base import signing
from trimtab.base.errors import NotVerified
from trimtab.catalog.goals import GOALS
from trimtab.judge import Verdict
from trimtab.loop import evidence
from trimtab.loop.decisions import facts_of
from trimtab.loop.documents import read_plan
from trimtab.loop.evidence import CONFIRMATION, LOOKS, look_name
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages import STAGES, Stage, signatures
from trimtab.stages.execution import METRICS
from trimtab.stages.looks import Piece, Subject, keyed_by
from trimtab.store import Store, Tree


class Unsupported(NotVerified):
    """The evidence does not support the release; the message says why."""


def refusal(store: Store, state: State, brief: Brief) -> str | None:
    """Returns why the evidence does not support releasing this attempt, or None when it does.

    Everything is read again from the store: nothing of the state is believed but the names of its trees.
    """
    if brief.evaluation is None:
        return "there is no evidence for the accepted attempt"
    document = evidence.read(store, brief.evaluation)
    if document["model"]["digest"] != state.model.digest:
        return f"the evidence is of model {document['model']['digest'][:12]}, not of {state.model.digest[:12]}"
    recipe = Recipe.parse(document["recipe"])
    if recipe.digest != brief.recipe.digest or recipe.accept != brief.recipe.accept:
        return "the evidence is of another recipe"
    named = {
        "plan": state.plan,
        "engine": brief.engine,
        "baseline_engine": state.baseline and state.baseline.engine,
    }
    for field, tree in named.items():
        if _digest(document.get(field)) != (tree.digest if tree else None):
            return f"the evidence is of another {field.replace('_', ' ')}"
    if not is_keyed_here(document):
        return "the evidence was made by another version of trimtab: run it again"
    if document["confirmations"] != evidence.confirmations(state):
        return "the evidence was confirmed on another attempt's items"
    store.manifest(Tree.model_validate(document["export"]))
    if (trusted := signing.validation_key()) and trusted.keyid != signed_by(document):
        return "the answers are not signed with the key of validation that the gate was given"
    return judge_anew(store, document)


def is_keyed_here(document: Mapping[str, Any]) -> bool:
    """Whether this version of trimtab makes keys as the one did that wrote the evidence."""
    return document.get("keyed_by") == keyed_by()


def signed_by(document: Mapping[str, Any]) -> str | None:
    """Returns the id of the key that the answers are signed with, None where they are not; `judge_anew` checks that."""
    pem = document.get("validation_key")
    return signing.public_key(pem).keyid if pem else None


def judge_anew(store: Store, document: Mapping[str, Any]) -> str | None:
    """Judges the stored answers that a document of evidence names; returns why they do not suffice, or None."""
    try:
        _Case(store, document).judge()
    except Unsupported as error:
        return str(error)
    return None


class _Case:
    """A document of evidence beside the plan of its run. Trees are looked up by their digest: a store may be a copy."""

    def __init__(self, store: Store, document: Mapping[str, Any]):
        self.store, self.document = store, document
        if not (document.get("plan") and document.get("engine") and document.get("baseline_engine")):
            raise Unsupported("the evidence names no plan or no engines: an earlier version of trimtab wrote it")
        self.plan = read_plan(store, self._here(document["plan"]))
        self.recipe = Recipe.parse(document["recipe"])
        self.measured = {name: self._here(tree) for name, tree in document["measured"].items()}
        self.public = signing.public_key(document["validation_key"]) if document.get("validation_key") else None

    def judge(self) -> None:
        self._check_plan()
        self._check_made()
        filed = Verdict.model_validate(self.document["verdict"])
        result = self._look()
        if result.looks != filed.looks:
            raise Unsupported(f"the evidence says {filed.looks} looks, and the answers decide at look {result.looks}")
        if self.plan.evaluation.confirm_items:
            self._check_answers(CONFIRMATION)
            attempts = self.plan.max_attempts
            result = _passed(evidence.confirm(self.store, self.measured, self.recipe, result, attempts))
        if filed.outcome != "accepted":
            raise Unsupported(f"the evidence says: {filed.outcome}, {filed.reason}")

    def _check_plan(self) -> None:
        plan, document = self.plan, self.document
        said = {
            "model": (document["model"]["digest"], plan.model.digest),
            "goal": (document["goal"], plan.goal),
            "target": (document["target"], plan.target),
            "max_attempts": (document["max_attempts"], plan.max_attempts),
            "evaluation": (Evaluation.parse(document["evaluation"] or {}), plan.evaluation),
        }
        for field, (claimed, planned) in said.items():
            if claimed != planned:
                raise Unsupported(f"the evidence has another {field} than its plan")
        if plan.dealt is None:
            raise Unsupported("its plan deals no items: an earlier version of trimtab wrote it")
        if not any(self.recipe.accept == rung.recipe.accept for rung in plan.ladder):
            raise Unsupported("the evidence has other limits (accept) than its plan")

    def _check_made(self) -> None:
        """What was measured was made by the recipe: the engines, and the export where the recipe quantizes."""
        subject, trees = self.subject, {**self.document["intermediate"], **self.document["trees"]}
        build, quantize = STAGES["engine"], STAGES["quantize"]
        sizes, before = build.parameters(self.recipe), build.parameters(self.plan.baseline)
        self._key("engine", build, sizes, {"export": subject.export}, subject.engine)
        self._key("baseline engine", build, before, {"export": subject.model}, subject.baseline_engine)
        if quantize.wanted(self.recipe):
            inputs = {name: trees.get(name) and self._here(trees[name]) for name in quantize.inputs}
            inputs["checkpoint"] = subject.checkpoint
            self._key("export", quantize, quantize.parameters(self.recipe), inputs, subject.export)

    def _look(self) -> Verdict:
        """Judges look by look, as validation did, and whether the goal came nearer."""
        for look in range(1, LOOKS + 1):
            self._check_answers(look)
            result = evidence.judge_looks(self.store, self.measured, self.recipe, look)
            if result.outcome != "indeterminate":
                break
        return self._check_gain(_passed(result))

    def _check_gain(self, result: Verdict) -> Verdict:
        self._check_piece("integrity", self.subject.integrity())
        self._check_piece("baseline-integrity", self.subject.integrity(baseline=True))
        names = (look_name(1), look_name(1, baseline=True), "integrity", "baseline-integrity")
        ours, theirs, files, their_files = (self._metrics(name) for name in names)
        if wrong := evidence.began_to_repeat(theirs, ours):
            raise Unsupported(f"judged anew, {wrong}")
        facts, target = facts_of(self.store, self.subject.model), self.plan.target
        candidate = evidence.measurements(facts, self.recipe, target, files, ours)
        baseline = evidence.measurements(facts, self.plan.baseline, target, their_files, theirs)
        if GOALS[self.plan.goal].measure.timed:
            self._check_piece("speed", self.subject.speed())
            speed = self._metrics("speed")
            candidate = evidence.with_speed(candidate, speed)
            baseline = evidence.with_speed(baseline, speed, baseline=True)
        return _passed(judge.check_gain(result, self.plan.goal, self.recipe.accept, baseline, candidate))

    def _check_answers(self, look: int) -> None:
        for baseline in (True, False):
            self._check_piece(look_name(look, baseline), self.subject.evaluation_of(look, baseline))

    def _check_piece(self, name: str, piece: Piece) -> None:
        """Checks that what is filed under a name is what was to be measured, and who measured it."""
        if name not in self.measured:
            what = "its confirmation" if name.endswith(f"look-{CONFIRMATION}") else f"'{name}'"
            raise Unsupported(f"the evidence lacks {what}")
        key = self._key(name, piece.stage, piece.parameters, piece.inputs, self.measured[name])
        if self.public:
            try:
                signatures.check(self.document["signatures"].get(name), key, self.measured[name], self.public)
            except NotVerified as error:
                raise Unsupported(f"'{name}' is not validation's: {error}") from None

    def _key(
        self, name: str, stage: Stage, parameters: Mapping[str, Any], inputs: Mapping[str, Tree | None], tree: Tree
    ) -> str:
        """Returns the key of a tree, after computing it, where that can be, from what the tree should be the result of.
        """
        about = self.store.manifest(tree).metadata
        if not is_keyed_here(self.document):
            return str(about.get("key"))
        if "environment" not in about:
            raise Unsupported(f"'{name}' does not say in which environment it was made: run it again")
        key = stage.key(parameters, inputs, about["environment"])
        if about.get("key") != key:
            raise Unsupported(f"'{name}' is not what the plan asks for: it is the result of something else")
        return key

    def _metrics(self, name: str) -> dict[str, Any]:
        return json.loads(self.store.read(self.measured[name], METRICS))

    def _here(self, tree: Mapping[str, Any]) -> Tree:
        return self.store.tree(tree["digest"], tree["bytes"])

    @cached_property
    def subject(self) -> Subject:
        document, plan = self.document, self.plan
        trees = {**document["intermediate"], **document["trees"]}
        model = self._here(document["model"])
        return Subject(
            evaluation=plan.evaluation,
            deal=plan.dealt,
            model=model,
            reads=facts_of(self.store, model).max_position_embeddings,
            recipe=self.recipe,
            checkpoint=self._here(trees["checkpoint"]) if "checkpoint" in trees else model,
            export=self._here(document["export"]),
            engine=self._here(document["engine"]),
            calibration=self._here(trees["calibration"]) if "calibration" in trees else None,
            baseline=plan.baseline,
            baseline_engine=self._here(document["baseline_engine"]),
            confirmations=document["confirmations"],
        )


def _passed(verdict: Verdict) -> Verdict:
    if verdict.outcome != "accepted":
        raise Unsupported(f"judged anew, the stored answers say: {verdict.outcome}, {verdict.reason}")
    return verdict


def _digest(tree: Mapping[str, Any] | None) -> str | None:
    return tree["digest"] if tree else None
