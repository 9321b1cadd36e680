"""Which items of which task are asked when: dealt once, when a run is planned, so that no look comes to an empty hand.

Every task gives its items to the looks and to the confirmation in the same proportion, so all of them ask the same
mixture of tasks. Where the tasks have fewer items than the evaluation asks for, looks and confirmation shrink alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from trimtab.base.errors import InputError, nearest
from trimtab.base.schema import Document
from trimtab.judge.statistics import normal_quantile, split_alpha
from trimtab.recipe import Acceptance
from trimtab.recipe.evaluation import Evaluation

#: A baseline is taken to score this share of what there is above chance when it is asked how many items a verdict
#: needs at least. Good models score more on easy tasks and less on hard ones.
ABILITY = 0.5

#: The looks of a run; `Evaluation` says how many items each adds.
LOOKS = 3

#: Where in the order of a task's items the asked ones begin and end: task -> [start, stop].
Spans = dict[str, list[int]]


class Deal(Document):
    """How many items of each task the looks and a confirmation ask, in the fixed order of the task's items.

    The items of a look come behind those of the look before, those of the first confirmation behind the last look's.
    `fresh` is how many confirmations without a common item each task has; a later one begins with the first again.
    `sizes` are the items that each task has in all.
    """

    looks: tuple[dict[str, int], ...]
    confirmation: dict[str, int]
    fresh: dict[str, int]
    sizes: dict[str, int] = {}

    def look(self, number: int) -> Spans:
        """Returns the items that a look adds; the first is 1."""
        before = [sum(look.get(task, 0) for look in self.looks[: number - 1]) for task in self.tasks]
        return self._spans(before, self.looks[number - 1])

    def confirm(self, earlier: int) -> Spans:
        """Returns the items of a confirmation, of which there were `earlier` ones in the run."""
        before = [
            sum(look.get(task, 0) for look in self.looks)
            + self.confirmation.get(task, 0) * (earlier % self.fresh.get(task, 1))
            for task in self.tasks
        ]
        return self._spans(before, self.confirmation)

    def asked_again(self, earlier: int) -> list[str]:
        """Returns the tasks of which that confirmation asks items that an earlier one has asked."""
        return [task for task, count in self.fresh.items() if earlier >= count]

    def with_more(self, tasks: Sequence[str], looked: int, fresh: int, attempts: int) -> Deal:
        """Returns the deal with so many more items of these tasks in the last look and in a confirmation, of which
        `attempts` are to come, as far as the tasks have them; both shrink alike where they have fewer."""
        left = {task: self.sizes.get(task, 0) - self._looked(task) - self.confirmation.get(task, 0) for task in tasks}
        asked = [looked, fresh if self.confirmation else 0]
        given = _quotas({task: max(0, count) for task, count in left.items()}, sum(asked))
        if not sum(given.values()):
            return self
        (last,), confirmation = _split(given, asked)
        looks = (*self.looks[:-1], _added(self.looks[-1], last))
        more = Deal(looks=looks, confirmation=_added(self.confirmation, confirmation), fresh={}, sizes=self.sizes)
        return more.model_copy(update={"fresh": more._confirmations(attempts)})

    def _looked(self, task: str) -> int:
        return sum(look.get(task, 0) for look in self.looks)

    def _confirmations(self, attempts: int) -> dict[str, int]:
        """How many confirmations of a run each task has items of its own for."""
        counts = self.confirmation.items()
        return {task: max(1, min(attempts, (self.sizes[task] - self._looked(task)) // count)) for task, count in counts}

    @property
    def tasks(self) -> list[str]:
        """The tasks that are asked."""
        return sorted({task for part in (*self.looks, self.confirmation) for task in part})

    def _spans(self, starts: Sequence[int], counts: Mapping[str, int]) -> Spans:
        spans = zip(self.tasks, starts, strict=True)
        return {task: [start, start + counts[task]] for task, start in spans if counts.get(task)}


def deal(sizes: Mapping[str, int], evaluation: Evaluation, accept: Acceptance, attempts: int) -> Deal:
    """Deals the items of the tasks to three looks and to the confirmations of `attempts` attempts.

    Tasks give equally many, as far as they have them.

    Args:
        sizes: the items that each task has.
        evaluation: how many items are asked for.
        accept: the limits, which say how many items are too few.
        attempts: the most attempts of the run. Each is confirmed on items of its own as long as its tasks have some.

    Raises:
        InputError: the tasks have too few items, or the evaluation asks for too few, for even an unchanged model to be
            accepted; says how many would do.
    """
    _check(evaluation, accept)
    _check_tiers(sizes, accept)
    asked = [*evaluation.items, evaluation.confirm_items]
    given = _quotas(sizes, sum(asked))
    looks, confirmation = _split(given, asked)
    _check_counts(sizes, evaluation, accept, attempts, [sum(map(_total, looks)), _total(confirmation)])
    found = Deal(looks=tuple(looks), confirmation=confirmation, fresh={}, sizes=dict(sizes))
    found = found.model_copy(update={"fresh": found._confirmations(attempts)})
    return _with_critical(found, accept, attempts)


def alphas(accept: Acceptance, attempts: int) -> tuple[float, float]:
    """Returns the one-sided errors of the last look and of a confirmation."""
    return split_alpha(1 - accept.confidence, LOOKS)[-1], min(0.5, 1 / attempts)


def fewest(limit: float, alpha: float) -> int:
    """Returns with how many items an artifact that answers all as the baseline does is shown to keep `limit`.

    Without one item that differs, the lower end of `statistics.paired_recovery` is at a loss of z^2 / (n + z^2) of the
    items, of a baseline that scores `ABILITY` above chance.

    Args:
        limit: the recovery, below 1.
        alpha: the one-sided error that is allowed.
    """
    z = normal_quantile(1 - alpha)
    return max(2, math.ceil(z * z * (1 / (ABILITY * (1 - limit)) - 1)))


def _check(evaluation: Evaluation, accept: Acceptance) -> None:
    if accept.min_recovery >= 1:
        raise InputError("accept.min_recovery: 1 is shown by no number of items; write less, such as 0.99")
    if not evaluation.items[0]:
        raise InputError(f"items: {list(evaluation.items)} gives the first look none; write [400, 600, 1000]")
    if evaluation.windows[0] < 2:
        raise InputError(
            f"windows: {list(evaluation.windows)} gives the first look {evaluation.windows[0]}, and perplexity is "
            "judged on 2 or more; write [20, 20, 20]"
        )
    if evaluation.confirm_items and evaluation.confirm_windows < 2:
        raise InputError(
            f"confirm_windows: {evaluation.confirm_windows} is too few, perplexity is judged on 2 or more; write 16, "
            "or confirm_items: 0 to confirm nothing"
        )


def _check_tiers(sizes: Mapping[str, int], accept: Acceptance) -> None:
    """Refuses limits of tasks that are not asked."""
    for field, names in (("critical", accept.critical), ("advisory", accept.advisory), ("required", accept.required)):
        for name in names:
            if not any(fnmatchcase(task, name) for task in sizes):
                remedy = nearest(name, sizes, listed=sorted(sizes)[:10])
                raise InputError(f"accept.{field}: '{name}' is no task of the evaluation; {remedy}")
    for name, limit in accept.critical.items():
        if limit >= 1:
            raise InputError(f"accept.critical: 1 of '{name}' is shown by no number of items; write less, such as 0.99")
    if not accept.pooled(sizes):
        raise InputError("accept.advisory: leaves no task to be judged; remove one")


def _with_critical(deal: Deal, accept: Acceptance, attempts: int) -> Deal:
    """Gives each critical task as many items as it takes to show that an unchanged model keeps its share."""
    for task in deal.sizes:
        if (limit := accept.limit(task)) is None:
            continue
        least = [fewest(limit, alpha) for alpha in alphas(accept, attempts)]
        least[1] *= bool(deal.confirmation)
        more = [max(0, need - count) for need, count in zip(least, _counts(deal, task), strict=True)]
        deal = deal.with_more([task], *more, attempts)
        if any(count < need for count, need in zip(_counts(deal, task), least, strict=True)):
            raise InputError(
                f"accept.critical: '{task}' has {deal.sizes[task]:,} items, and with fewer than {sum(least):,} for the "
                f"looks and the confirmation together even an unchanged model could not be shown to keep {limit:g}; "
                "write a lower share, or name a larger task"
            )
    return deal


def _counts(deal: Deal, task: str) -> tuple[int, int]:
    return deal._looked(task), deal.confirmation.get(task, 0)


def _added(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {task: counts.get(task, 0) + more.get(task, 0) for task in sorted({*counts, *more})}


def _check_counts(
    sizes: Mapping[str, int], evaluation: Evaluation, accept: Acceptance, attempts: int, got: Sequence[int]
) -> None:
    """Compares what the looks together and the confirmation got with what they need."""
    asked = [sum(evaluation.items), evaluation.confirm_items]
    least = [
        fewest(accept.min_recovery, alphas(accept, attempts)[0]),
        fewest(accept.min_recovery, alphas(accept, attempts)[1]) if evaluation.confirm_items else 0,
    ]
    if all(have >= need for have, need in zip(got, least, strict=True)):
        return
    why = f"even an unchanged model could not be shown to keep {accept.min_recovery:g} of its accuracy"
    for field, count, need in zip(("items", "confirm_items"), asked, least, strict=True):
        if count < need:
            raise InputError(f"{field}: {count} in all are too few, {why}; write at least {need} in all")
    # The shares are rounded, so a number that just does is tried.
    enough = max(math.ceil(need * sum(asked) / count) for need, count in zip(least, asked, strict=True) if count)
    names = ", ".join(sorted(sizes)[:3]) + (" …" if len(sizes) > 3 else "")
    raise InputError(
        f"tasks: {names} {'has' if len(sizes) == 1 else 'have'} {sum(sizes.values()):,} items for the looks and the "
        f"confirmation together, and with fewer than {enough + 1:,} {why}; name more tasks, or larger ones"
    )


def _quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divides `total` items among the tasks: equally, and what a small task lacks among the others."""
    quotas: dict[str, int] = {}
    left = total
    for rank, (task, size) in enumerate(sorted(sizes.items(), key=lambda pair: (pair[1], pair[0]))):
        quotas[task] = min(size, left // (len(sizes) - rank))
        left -= quotas[task]
    return quotas


def _split(quotas: Mapping[str, int], asked: Sequence[int]) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Cuts the tasks' items, laid into one row in which each is spread evenly, in the proportion of `asked`."""
    row = sorted(((i + 0.5) / quota, task) for task, quota in quotas.items() for i in range(quota))
    ends = [max(1, round(len(row) * sum(asked[: n + 1]) / sum(asked))) for n in range(len(asked))]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        counts: dict[str, int] = {}
        for _, task in row[start:end]:
            counts[task] = counts.get(task, 0) + 1
        parts.append(counts)
    return parts[:-1], parts[-1]


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
