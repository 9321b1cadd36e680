"""The plan and the attempts of a run, as immutable documents in the store.

Between tasks travels the URI of an attempt's document, a few dozen bytes, and nothing else of it: so no string that
Kubeflow Pipelines carries grows with what is said in a document, or with the number of attempts. An attempt names its
plan and the attempt before it; what was tried so far is read by following these.
"""

from __future__ import annotations

from typing import Any

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.base.transient import insist
from trimtab.catalog.goals import GoalName
from trimtab.judge import Verdict
from trimtab.loop.state import Brief, State
from trimtab.planning.dealing import Deal
from trimtab.planning.matrix import Rung
from trimtab.planning.resources import Resources
from trimtab.recipe import Limits, Prices, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import Store, Tree, open_store
from trimtab.store.address import split_tree


class Plan(Document):
    """The whole plan of a run, written once before any work.

    `ladder` are the recipes to try, `baseline` is how the unchanged model is served, `materials` what the run is made
    of. `resources` say for each stage of the baseline and of each rung what it needs, by the digest of its recipe.
    `dealt` says which items of which task serve which look; `limits` what the run may spend, by `prices`.
    """

    name: str
    goal: GoalName
    target: str
    model: Tree
    max_attempts: int
    evaluation: Evaluation
    limits: Limits | None = None
    prices: Prices | None = None
    ladder: tuple[Rung, ...] = ()
    baseline: Recipe = Recipe()
    materials: dict[str, Any] | None = None
    resources: dict[str, dict[str, Resources]] = {}
    dealt: Deal | None = None


class Attempt(Document):
    """One recipe on its way, or at its end.

    `number` 0 is the baseline, `parent` the attempt before. `evaluation` is the evidence of one that was accepted, and
    `is_over` says that it is judged and filed. The other fields are those of `State`.
    """

    plan: Tree
    parent: Tree | None = None
    number: int = 0
    recipe: Recipe
    why: str = ""
    trees: dict[str, Tree] = {}
    verdict: Verdict | None = None
    seconds: dict[str, float] = {}
    used: dict[str, Resources] = {}
    cpu_seconds: dict[str, float] = {}
    libraries: dict[str, dict[str, str]] = {}
    evaluation: Tree | None = None
    is_over: bool = False

    @property
    def brief(self) -> Brief:
        """What is remembered of it."""
        return Brief(
            recipe=self.recipe,
            why=self.why,
            verdict=self.verdict,
            seconds=self.seconds,
            used=self.used,
            cpu_seconds=self.cpu_seconds,
            evaluation=self.evaluation,
            engine=self.trees.get("engine"),
        )


#: The kinds of these documents' trees.
PLAN, ATTEMPT = "plan", "attempt"
#: What an attempt's document and the state have in common.
_CURRENT = ("recipe", "why", "trees", "verdict", "seconds", "cpu_seconds", "used", "libraries")
_PLANNED = ("name", "goal", "target", "model", "max_attempts", "evaluation", "limits", "prices")


def save(state: State) -> str:
    """Writes where a run stands and returns the URI of the document of its current attempt.

    What is in the store already, the plan and the attempts that are over, is named and not written again, as far as it
    says what the state says.
    """
    return insist("state", lambda: _saved(state))


def _saved(state: State) -> str:
    store = open_store(state.store)
    plan, filed = _plan(store, state), []
    known = list(state.filed) if plan == state.plan else []
    for number, brief in enumerate(state.finished):
        if known and read_attempt(store, known[0]).brief == brief:
            filed.append(known.pop(0))
            continue
        known = []  # those behind it name another parent
        fields = ("recipe", "why", "verdict", "seconds", "cpu_seconds", "used", "evaluation")
        said = {name: getattr(brief, name) for name in fields}
        said["trees"] = {"engine": brief.engine} if brief.engine else {}
        if number == state.attempt:
            said |= {"trees": said["trees"] | state.trees, "libraries": state.libraries}
        parent = filed[-1] if filed else None
        filed.append(_put(store, Attempt(plan=plan, parent=parent, number=number, is_over=True, **said)))
    if state.is_over:
        return filed[-1].uri
    said = {name: getattr(state, name) for name in _CURRENT}
    return _put(store, Attempt(plan=plan, parent=filed[-1] if filed else None, number=state.attempt, **said)).uri


def load(uri: str) -> State:
    """Reads where a run stands.

    Args:
        uri: what `save` returned.

    Raises:
        InputError: not the URI of an attempt.
        Damaged: a document that it needs is not there.
    """
    return insist("state", lambda: _loaded(uri))


def _loaded(uri: str) -> State:
    parts = split_tree(uri)
    if not parts:
        raise InputError(f"state: '{uri}' is not valid; write the URI of an attempt, <store>/trees/<64 hex digits>")
    store = open_store(parts[0])
    found = store.manifest(uri)
    if found.kind != ATTEMPT:  # and it is not brought here, however large
        raise InputError(f"state: {uri} is no attempt but a {found.kind}; write what a task of the run returned")
    current = read_attempt(store, uri)
    past = [(store.tree(parts[1], found.size), current)] if current.is_over else []
    parent = current.parent
    while parent:
        past.append((parent, read_attempt(store, parent)))
        parent = past[-1][1].parent
    past.reverse()
    briefs = [attempt.brief for _, attempt in past]
    plan = read_plan(store, current.plan)
    return State(
        store=store.uri,
        **{name: getattr(plan, name) for name in _PLANNED},
        plan=current.plan,
        attempt=current.number,
        **{name: getattr(current, name) for name in _CURRENT},
        baseline=briefs[0] if briefs else None,
        history=tuple(briefs[1:]),
        filed=tuple(tree for tree, _ in past),
    )


def _plan(store: Store, state: State) -> Tree:
    """Returns the plan that says what the state says."""
    planned = {name: getattr(state, name) for name in _PLANNED}
    if state.plan is None:
        return write_plan(store, Plan(**planned))
    known = read_plan(store, state.plan)
    wanted = known.model_copy(update=planned)
    return state.plan if wanted == known else write_plan(store, wanted)


def write_plan(store: Store, plan: Plan) -> Tree:
    """Stores a plan and returns its tree."""
    return store.put_json(PLAN, plan.to_dict())


def read_plan(store: Store, tree: Tree) -> Plan:
    """Reads what `write_plan` stored."""
    return Plan.parse(store.get_json(PLAN, tree))


def read_attempt(store: Store, tree: Tree | str) -> Attempt:
    """Reads the document of one attempt."""
    return Attempt.parse(store.get_json(ATTEMPT, tree))


def _put(store: Store, attempt: Attempt) -> Tree:
    return store.put_json(ATTEMPT, attempt.to_dict())
