"""How many items a run draws so that they can decide: told when it is planned, and again when the baseline is known."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.judge import Scores
from trimtab.judge.power import MOST, Power, group
from trimtab.judge.statistics import wilson
from trimtab.planning.dealing import ABILITY, Deal, alphas
from trimtab.recipe import Acceptance
from trimtab.recipe.acceptance import CRITICAL
from trimtab.recipe.evaluation import Evaluation

#: What guessing is taken to score before any item is read: one of four choices.
CHANCE = 0.25


def assumed(deal: Deal, evaluation: Evaluation, accept: Acceptance, attempts: int) -> Power:
    """Returns what the dealt items can show of a baseline that scores `ABILITY` of what there is above chance."""
    right = CHANCE + ABILITY * (1 - CHANCE)
    known = dict.fromkeys(_groups(accept, deal.tasks), (right, CHANCE, right))
    return _power(known, deal, evaluation, accept, attempts).model_copy(update={"assumed": True})


def measured(scores: Scores, deal: Deal, evaluation: Evaluation, accept: Acceptance, attempts: int) -> Power:
    """Returns what the dealt items can show, given what the baseline scored at its first look."""
    known = {}
    for name, tasks in _groups(accept, sorted(set(scores.tasks.tolist()))).items():
        of = [task in tasks for task in scores.tasks.tolist()]
        right, chance = scores.items[of], scores.chance[of]
        interval = wilson(float(right.sum()), len(right), accept.confidence)
        known[name] = (interval.estimate, float(chance.mean()), interval.high)
    return _power(known, deal, evaluation, accept, attempts)


def enlarged(deal: Deal, power: Power, accept: Acceptance, attempts: int) -> Deal:
    """Returns the deal with as many more items in its last look and its confirmation as are needed and there are.

    The looks before stay what they are: the baseline has answered the first.
    """
    tasks = _groups(accept, deal.tasks)
    for found in power.groups:
        if found.shown < power.wanted and found.task in tasks and found.needed < MOST:
            more = max(0, found.needed - found.items), max(0, found.needed_fresh - found.fresh)
            deal = deal.with_more(sorted(tasks[found.task]), *more, attempts)
    return deal


def _groups(accept: Acceptance, tasks: list[str]) -> dict[str, set[str]]:
    """The tasks that are judged together: those of the pool under "", and each critical one under its name."""
    pool = accept.pooled(tasks)
    found = {"": pool} if pool else {}
    return found | {task: {task} for task in tasks if accept.tier(task) == CRITICAL}


def _power(
    known: Mapping[str, tuple[float, float, float]],
    deal: Deal,
    evaluation: Evaluation,
    accept: Acceptance,
    attempts: int,
) -> Power:
    tasks, found = _groups(accept, deal.tasks), []
    for name, (accuracy, chance, highest) in known.items():
        found.append(
            group(
                task=name,
                limit=accept.limit(name) if name else accept.min_recovery,
                recovery=evaluation.true_recovery,
                accuracy=accuracy,
                chance=chance,
                highest=highest,
                items=sum(look.get(task, 0) for look in deal.looks for task in tasks.get(name, ())),
                fresh=sum(deal.confirmation.get(task, 0) for task in tasks.get(name, ())),
                alphas=alphas(accept, attempts),
                wanted=evaluation.power,
            )
        )
    return Power(wanted=evaluation.power, groups=tuple(found))
