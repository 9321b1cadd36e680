"""Where a run stands, as the decisions, the stages and the report read it.

It is read from documents in the store and written as one (`trimtab.loop.documents`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.base.schema import Document
from trimtab.catalog.goals import GoalName
from trimtab.judge import Verdict
from trimtab.planning.resources import Resources
from trimtab.recipe import Limits, Prices, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store.tree import Tree


class Brief(Document):
    """One attempt that is over, in brief: what adjust and the summary read.

    `evaluation` is the evidence of an accepted attempt, `engine` the tree that was judged. `seconds` are on the
    clock and `cpu_seconds` of all cores together, by stage; `used` is what each took when it was done, here or for an
    earlier attempt.
    """

    recipe: Recipe
    why: str = ""
    verdict: Verdict
    seconds: dict[str, float] = {}
    used: dict[str, Resources] = {}
    cpu_seconds: dict[str, float] = {}
    evaluation: Tree | None = None
    engine: Tree | None = None


class State(Document):
    """Where a run stands. `attempt` 0 is the baseline: the model unchanged.

    What is planned once: `store` to `prices`, and `plan`, the document that says more (the ladder, what the run
    is made of).

    What the current attempt is: `recipe` and `why`; what its stages have made, `trees` by name (`checkpoint`, which is
    the model, then its pruned and distilled successors; `calibration`, `export`, `engine`); the `seconds` of each, and
    its `cpu_seconds`; what each has `used`. Its `verdict` is set when it is over; every later stage then passes the
    state on untouched. `libraries` says for each stage which versions its image has, as its last task found them.

    What is over: `baseline` and `history`, whose documents are `filed`, in this order.
    """

    store: str
    name: str = "model"
    goal: GoalName
    target: str
    evaluation: Evaluation = Evaluation()
    model: Tree
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 5
    limits: Limits | None = None
    prices: Prices | None = None
    plan: Tree | None = None
    attempt: int = 0
    recipe: Recipe = Recipe()
    why: str = ""
    trees: dict[str, Tree] = {}
    verdict: Verdict | None = None
    seconds: dict[str, float] = {}
    used: dict[str, Resources] = {}
    cpu_seconds: dict[str, float] = {}
    libraries: dict[str, dict[str, str]] = {}
    baseline: Brief | None = None
    history: tuple[Brief, ...] = ()
    filed: tuple[Tree, ...] = ()

    @property
    def finished(self) -> tuple[Brief, ...]:
        """The baseline, once it is measured, and the attempts that are over."""
        return (self.baseline, *self.history) if self.baseline else ()

    @property
    def is_over(self) -> bool:
        """Whether the current attempt is among these; no other begins where the baseline failed."""
        return self.attempt < len(self.finished)


def fail(state: State, name: str, failure: Failure) -> State:
    """Makes an expected failure of a stage the state's verdict."""
    progress.report(name, failure.reason)
    verdict = Verdict(outcome="rejected", failure_class=failure.failure_class, reason=failure.reason, stage=name)
    return state.model_copy(update={"verdict": verdict})
