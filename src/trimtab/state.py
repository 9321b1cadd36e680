"""What flows round the loop: one JSON string under 16 kB. Anything larger is a tree in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, WrapSerializer, model_validator

from trimtab.errors import TrimtabError
from trimtab.recipe import Recipe
from trimtab.schema import Document
from trimtab.store.tree import Tree
from trimtab.verdict import Verdict

#: KFP carries the state as a parameter; the limit keeps it far from every size limit on the way.
MAX_STATE_BYTES = 16_000

Goal = Literal["lower_latency", "higher_throughput", "fit_larger_model", "long_context", "lower_cost"]
GOALS: tuple[str, ...] = Goal.__args__
Count = Annotated[int, Field(ge=0)]


class Evaluation(Document):
    """What is measured: lm-eval tasks, and how many items and text windows each of three looks adds.

    `confirm_items` and `confirm_windows` are drawn after acceptance and are disjoint from those of the looks.
    """

    tasks: tuple[str, ...] = ("trimtab_suite",)
    task_path: str = ""
    items: tuple[Count, Count, Count] = (400, 600, 1000)
    windows: tuple[Count, Count, Count] = (20, 20, 20)
    confirm_items: Count = 960
    confirm_windows: Count = 16
    window_tokens: Annotated[int, Field(ge=16)] = 256
    heldout: str = "builtin"


#: Decimals, at most, with which a number of a verdict is written in a sentence or on a page.
_DECIMALS = 4


def _in_brief(value: Any) -> Any:
    """Rounds the numbers of a verdict to five digits, more than its intervals are worth.

    A number is written out before and after that, and 1.31549 rounded twice is another number, 1.316, than rounded
    once: where that would show, it keeps as many digits as it takes.
    """
    if isinstance(value, dict):
        return {name: _in_brief(part) for name, part in value.items()}
    if not isinstance(value, float):
        return value
    shorter = (float(f"{value:.{digits}g}") for digits in range(5, 17))
    return next((short for short in shorter if _written(short) == _written(value)), value)


def _written(value: float) -> list[str]:
    return [f"{value:.{decimals}f}" for decimals in range(_DECIMALS + 1)]


BriefVerdict = Annotated[Verdict, WrapSerializer(lambda value, handler: _in_brief(handler(value)), when_used="json")]


class Brief(Document):
    """One finished attempt, in brief: what adjust and the summary read.

    `engine` is kept of the baseline, which later looks measure again, and of an accepted attempt.
    """

    recipe: Recipe
    why: str = ""
    verdict: BriefVerdict
    seconds: dict[str, float] = {}
    evaluation: Tree | None = None
    engine: Tree | None = None


class State(Document):
    """Where a run stands. `attempt` 0 is the baseline: the model unchanged.

    `trees` names what the stages of the current attempt have made: `checkpoint` (the model, then its pruned
    and distilled successors), `calibration`, `export`, `engine`, `evaluation`. `ladder` is the tree that
    holds the recipes to try, and what the run is made of. `verdict` is set when the current attempt is over; every
    later stage of that attempt then passes the state on untouched. Once the attempt is filed in `baseline` or
    `history`, that has its numbers, and of `trees` only the artifact is left.
    """

    store: str
    name: str = "model"
    goal: Goal
    target: str
    evaluation: Evaluation = Evaluation()
    model: Tree
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 5
    ladder: Tree | None = None
    attempt: int = 0
    recipe: Recipe = Recipe()
    why: str = ""
    trees: dict[str, Tree] = {}
    baseline: Brief | None = None
    verdict: BriefVerdict | None = None
    history: tuple[Brief, ...] = ()
    seconds: dict[str, float] = {}

    @model_validator(mode="before")
    @classmethod
    def _calibrate_each(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "calibrate" not in value:
            return value
        document = {name: part for name, part in value.items() if name != "calibrate"}
        shared = {"calibrate": value["calibrate"]}
        history = [{**brief, "recipe": {**brief["recipe"], **shared}} for brief in document.get("history", ())]
        return {**document, "recipe": {**document.get("recipe", {}), **shared}, "history": history}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without defaults; what all attempts are calibrated on is written once, at the top."""
        document = super().to_dict()
        recipes = [part.get("recipe", {}) for part in (document, *document.get("history", ()))]
        shared = recipes[0].get("calibrate")
        if shared and all(recipe.get("calibrate") == shared for recipe in recipes):
            for recipe in recipes:
                del recipe["calibrate"]
            document["calibrate"] = shared
        return document

    def to_json(self) -> str:
        text = super().to_json()
        if len(text.encode()) > MAX_STATE_BYTES:
            raise TrimtabError(f"the state has {len(text.encode())} bytes, more than {MAX_STATE_BYTES}")
        return text
