"""The section `accept`: what the artifact must still be able to do, by tiers of tasks, and how sure one must be of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from trimtab.base.user_document import UserDocument

#: What a task is to a verdict.
CRITICAL, SUPPORTING, ADVISORY = "critical", "supporting", "advisory"

Recovery = Annotated[float, Field(gt=0, le=1)]

#: Fields that are written down only where they differ from their defaults: recipes from before them stay what they are.
_LATER = ("critical", "advisory", "required")


class Acceptance(UserDocument):
    """What the artifact must keep of the baseline, and how sure one must be of it.

    Tasks have tiers. Each critical one must keep its own share, and blocks alone. The supporting ones, which are all
    that are named nowhere, must keep `min_recovery` together. Advisory ones are shown.

    Example::

        min_recovery: 0.95
        critical: {gsm8k: 0.97, "mmlu_*": 0.9}
        advisory: [truthfulqa_mc2]
        required: [ifeval]
    """

    min_recovery: Recovery = 0.95
    """The share of the baseline's accuracy above chance that must be left, over all supporting tasks together."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] = 1.10
    """The artifact's perplexity over the baseline's, on the same windows, at most."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """One minus the probability of a false acceptance."""
    min_gain: Annotated[float, Field(ge=0)] = 0.02
    """The relative improvement at the goal below which the artifact is useless: 0.02 is 2 %."""
    critical: dict[str, Recovery] = {}
    """Tasks that must each keep a share of their own, {task: share}, by name with shell wildcards; the last that
    matches counts. They are judged apart from the others, and together with `min_recovery` only where there is no
    other task."""
    advisory: tuple[str, ...] = ()
    """Tasks that are shown and decide nothing, by name with shell wildcards."""
    required: tuple[str, ...] = ()
    """Tasks without which nothing is accepted, by name with shell wildcards; critical ones are required anyway."""

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k not in _LATER or v}

    @model_validator(mode="after")
    def _one_tier_each(self) -> Acceptance:
        if both := sorted({*self.critical} & {*self.advisory}):
            raise ValueError(f"has '{both[0]}' in critical and in advisory; name it in one of the two")
        for field, names in (("critical", self.critical), ("advisory", self.advisory), ("required", self.required)):
            if "" in names:
                raise ValueError(f"has a task without a name in {field}; write the name of a task, such as gsm8k")
        return self

    def tier(self, task: str) -> str:
        """Returns what a task is to the verdict: 'critical', 'supporting' or 'advisory'."""
        if self.limit(task) is not None:
            return CRITICAL
        return ADVISORY if _matches(task, self.advisory) else SUPPORTING

    def limit(self, task: str) -> float | None:
        """Returns the share that a critical task must keep; None of any other."""
        return next((share for name, share in reversed(self.critical.items()) if fnmatchcase(task, name)), None)

    def pooled(self, tasks: Iterable[str]) -> set[str]:
        """Returns the tasks that `min_recovery` is asked of together: the supporting ones, or the critical ones where
        there is no other."""
        by_tier = {tier: {task for task in tasks if self.tier(task) == tier} for tier in (SUPPORTING, CRITICAL)}
        return by_tier[SUPPORTING] or by_tier[CRITICAL]

    def missing(self, tasks: Iterable[str]) -> list[str]:
        """Returns the names of required and critical tasks that none of these tasks has."""
        found = set(tasks)
        wanted = dict.fromkeys((*self.critical, *self.required))
        return [name for name in wanted if not any(fnmatchcase(task, name) for task in found)]


def _matches(task: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(task, name) for name in names)
