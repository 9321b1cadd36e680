"""What a number of items can show, before they are asked: the power of the recovery criterion.

A verdict that comes out "too few to tell" has cost its attempt for nothing, and that can be known as soon as the
baseline has answered: how far it lies above chance says how many items a true recovery needs to be shown.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from trimtab.base.schema import Document
from trimtab.judge.statistics import normal_quantile, rates_given_loss

#: The share of items whose answers change for no loss at all, half of them lost and half gained. SmolLM2-135M mixed of
#: INT4 and INT8 has a recovery of 0.970 on 2,000 items of trimtab's suite, 0.953 to 0.986 at 94.3 % (README): with a
#: standard error of 0.0087 and an ability of 0.5, 2000 (0.0087 * 0.5)^2 = 0.038 of the items differ, 0.015 truly lost.
CHURN = 0.02
#: The share of the way from a limit to 1 that an artifact is taken to keep which ought to be shown to be good enough:
#: 0.98 for 0.95.
GOOD = 0.6
#: No number of items that is looked for is larger.
MOST = 10_000_000
_NORMAL = NormalDist()


class GroupPower(Document):
    """Of the items that are judged together: those of a critical `task`, or of all supporting ones, "".

    `accuracy` and `chance` are the baseline's, `highest` the upper end of its accuracy's interval. `items` and `fresh`
    are those of all looks and of a confirmation. `shown` is the probability that an artifact which truly keeps
    `recovery` is shown to keep `limit`, and is confirmed; `unchanged` the same of one that keeps everything, if the
    baseline has `highest`. With `needed` and `needed_fresh` items it is shown with the probability that is wanted.
    """

    task: str = ""
    limit: float
    recovery: float
    accuracy: float
    chance: float
    highest: float
    items: int
    fresh: int
    shown: float
    unchanged: float
    needed: int
    needed_fresh: int


class Power(Document):
    """What the items of a run can show. `wanted` is the probability that is asked for, `assumed` says that the baseline
    has not answered yet."""

    wanted: float
    assumed: bool = False
    groups: tuple[GroupPower, ...] = ()

    @property
    def least(self) -> GroupPower | None:
        """The group whose items show least; None without any."""
        return min(self.groups, key=lambda group: group.shown, default=None)

    @property
    def decides(self) -> bool:
        """Whether an artifact that keeps everything would rather be accepted than not."""
        return all(group.unchanged >= 0.5 for group in self.groups)

    @property
    def sentence(self) -> str:
        """What is told of it before anything is spent."""
        group = self.least
        if group is None:
            return ""
        whose = f"of {group.task} " if group.task else ""
        basis = "a baseline halfway between chance and 1" if self.assumed else f"the baseline's {group.accuracy:.3f}"
        told = (
            f"with {group.items:,} items {whose}and {group.fresh:,} fresh ones an artifact that truly keeps "
            f"{group.recovery:g} is shown to keep {group.limit:g} with probability {group.shown:.2f} ({basis})"
        )
        if group.shown >= self.wanted:
            return told
        if group.needed >= MOST:
            return f"{told}; no number of items would do: choose tasks that the model can do"
        return f"{told}; {group.needed:,} and {group.needed_fresh:,} fresh ones would do for {self.wanted:g}"


def probability(
    recovery: float, limit: float, accuracy: float, chance: float, items: int, alpha: float, churn: float = CHURN
) -> float:
    """Returns the probability that `statistics.paired_recovery` has a lower end at or above `limit`.

    By a normal distribution, with the score test's two variances: of the truth, where lost items are the share that
    `recovery` says and half of `churn` and gained ones the other half, and of what the test fits to that at the limit.

    Args:
        recovery: the true one.
        accuracy, chance: the baseline's, as shares of the items.
        items: how many are asked.
        alpha: the one-sided error.
    """
    ability = accuracy - chance
    if items < 1 or ability <= 0:
        return 0.0
    loss, least = (1 - recovery) * ability, (1 - limit) * ability
    gained = min(churn / 2, 1 - accuracy)
    lost = min(loss + churn / 2, accuracy)
    truth = _variance(lost, gained, loss, limit, accuracy, chance)
    fitted = _variance(*rates_given_loss(lost, gained, 1, least), least, limit, accuracy, chance)
    lead = items * (recovery - limit) * ability - normal_quantile(1 - alpha) * math.sqrt(items * fitted)
    return _NORMAL.cdf(lead / math.sqrt(items * truth))


def _variance(lost: float, gained: float, loss: float, limit: float, accuracy: float, chance: float) -> float:
    """Of one item's part in the test of `limit`: (candidate - chance) - limit (baseline - chance)."""
    share = 1 - limit
    covariance = -lost * (1 - chance) - gained * chance + loss * (accuracy - chance)
    return max(lost + gained - loss**2 + 2 * share * covariance + share**2 * accuracy * (1 - accuracy), 1e-9)


def needed(recovery: float, limit: float, accuracy: float, chance: float, alpha: float, wanted: float) -> int:
    """Returns the fewest items with which `probability` is at least `wanted`; `MOST` where fewer are not enough."""
    few, many = 0, 1
    while probability(recovery, limit, accuracy, chance, many, alpha) < wanted:
        few, many = many, 2 * many
        if many >= MOST:
            return MOST
    while many - few > 1:
        middle = (few + many) // 2
        enough = probability(recovery, limit, accuracy, chance, middle, alpha) >= wanted
        few, many = (few, middle) if enough else (middle, many)
    return many


def group(
    *,
    task: str,
    limit: float,
    recovery: float | None,
    accuracy: float,
    chance: float,
    highest: float,
    items: int,
    fresh: int,
    alphas: tuple[float, float],
    wanted: float,
) -> GroupPower:
    """Returns what a number of items can show, at the last look and in a confirmation.

    Args:
        recovery: the true one that ought to be shown; `GOOD` of the way from the limit to 1 if None.
        fresh: items of a confirmation; 0 where nothing is confirmed.
        alphas: the one-sided errors of the last look and of a confirmation.
        wanted: the probability that looks and confirmation together should have.
    """
    good = limit + GOOD * (1 - limit) if recovery is None else max(recovery, limit)

    def shown(kept: float, right: float) -> float:
        looks = probability(kept, limit, right, chance, items, alphas[0])
        return looks * (probability(kept, limit, right, chance, fresh, alphas[1]) if fresh else 1.0)

    each = math.sqrt(wanted) if fresh else wanted
    enough = [needed(good, limit, accuracy, chance, alpha, each) for alpha in alphas]
    return GroupPower(
        task=task,
        limit=limit,
        recovery=round(good, 4),
        accuracy=round(accuracy, 4),
        chance=round(chance, 4),
        highest=round(highest, 4),
        items=items,
        fresh=fresh,
        shown=round(shown(good, accuracy), 4),
        unchanged=round(shown(1.0, highest), 4),
        needed=enough[0],
        needed_fresh=enough[1] if fresh else 0,
    )
