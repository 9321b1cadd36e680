"""What the stored answers say of each task: for the papers of a release, which tell more than its verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.judge import Damage
from trimtab.judge.statistics import Interval, wilson
from trimtab.loop.evidence import judge_looks, look_name
from trimtab.recipe import Recipe
from trimtab.store import Store

CONFIDENCE = 0.95


@dataclass(frozen=True)
class TaskScore:
    """One task: its items, and the share answered rightly by the unchanged model and by the released one."""

    task: str
    items: int
    baseline: Interval
    candidate: Interval


def task_scores(store: Store, evidence: Mapping[str, Any]) -> list[TaskScore]:
    """Returns the scores of the tasks over all looks, those of the confirmation apart, by Wilson's intervals."""
    ours, theirs = (_answers(store, evidence, baseline) for baseline in (False, True))
    return [TaskScore(task, len(ours[task]), _interval(theirs[task]), _interval(ours[task])) for task in sorted(ours)]


def damage(store: Store, evidence: Mapping[str, Any]) -> Damage | None:
    """Returns the damage card, computed again from the stored answers; None where there are none."""
    looks, recipe = evidence["verdict"].get("looks", 0), Recipe.parse(evidence["recipe"])
    if not looks:
        return None
    measured = {name: store.tree(tree["digest"]) for name, tree in evidence["measured"].items()}
    return judge_looks(store, measured, recipe, looks).damage


def _answers(store: Store, evidence: Mapping[str, Any], baseline: bool) -> dict[str, list[float]]:
    """Returns the scores of the items by their task, which an item's id begins with."""
    found: dict[str, list[float]] = {}
    for look in range(1, evidence["verdict"].get("looks", 0) + 1):
        tree = evidence["measured"][look_name(look, baseline)]
        for line in store.read(store.tree(tree["digest"]), "items.jsonl").decode().splitlines():
            item = json.loads(line)
            found.setdefault(item["id"].partition("/")[0], []).append(item["score"])
    return found


def _interval(scores: list[float]) -> Interval:
    return wilson(sum(scores), len(scores), CONFIDENCE)
