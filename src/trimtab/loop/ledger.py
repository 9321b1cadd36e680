"""What a run has cost, what it may still spend, and what its artifact saves: hours by measurement, money by prices.

Hours are those of a stage's own work. A stage that was found in the store cost nothing here. What a cluster bills
besides, pods that start and wait, is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trimtab.judge import Measurements
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.recipe.cost import Prices

HOUR = 3600.0
MILLION = 1e6


@dataclass(frozen=True)
class Line:
    """What one stage of one attempt took: seconds on the clock, of all its GPUs together, and of all cores together.

    `cost` is in the currency of the prices; None without prices. A stage on GPUs is paid by the GPU's hour alone.
    """

    attempt: int
    stage: str
    seconds: float
    gpu_seconds: float
    cpu_seconds: float
    cost: float | None


@dataclass(frozen=True)
class Ledger:
    """What a run has spent, line by line."""

    lines: tuple[Line, ...]
    currency: str

    @property
    def gpu_hours(self) -> float:
        return sum(line.gpu_seconds for line in self.lines) / HOUR

    @property
    def cpu_hours(self) -> float:
        return sum(line.cpu_seconds for line in self.lines) / HOUR

    @property
    def cost(self) -> float | None:
        """None without prices."""
        return None if any(line.cost is None for line in self.lines) else sum(line.cost for line in self.lines)

    def of(self, attempt: int) -> Ledger:
        """Returns the part of one attempt; 0 is the baseline."""
        return Ledger(tuple(line for line in self.lines if line.attempt == attempt), self.currency)


@dataclass(frozen=True)
class Savings:
    """What a million tokens of answers costs, before and after, by throughput as it was measured.

    In hours of a device, a GPU or a core, and in the currency of the prices, None without them. `tokens_to_pay` is
    after how many tokens the saving has paid for the run, in money or else in hours; infinite where nothing is
    saved, None where nothing was spent.
    """

    before_hours: float
    after_hours: float
    before_cost: float | None
    after_cost: float | None
    tokens_to_pay: float | None


def accelerators_of(stage: str, recipe: Recipe, target: str, baseline: Recipe | None = None) -> int:
    """Returns how many accelerators a stage's work takes.

    Args:
        baseline: the unchanged model's recipe, which validation measures beside an attempt.
    """
    if target == "cpu" or stage == "fetch":
        return 0
    world = recipe.engine.world_size
    if stage == "validate":
        return max(world, baseline.engine.world_size if baseline else 1)
    if stage == "distill":
        return recipe.distill.processes if recipe.distill else 1
    return world if stage == "engine" else 1


def ledger(state: State) -> Ledger:
    """Returns what the attempts that are over have spent, the baseline's first."""
    return Ledger(tuple(_lines(state)), state.prices.currency if state.prices else "")


def _lines(state: State) -> Iterator[Line]:
    baseline = state.baseline.recipe if state.baseline else None
    for number, brief in enumerate(state.finished):
        for stage, seconds in brief.seconds.items():
            gpus = accelerators_of(stage, brief.recipe, state.target, baseline)
            busy = brief.cpu_seconds.get(stage, 0.0) if seconds else 0.0
            cost = _cost(gpus * seconds, 0.0 if gpus else busy, state.prices)
            yield Line(number, stage, seconds, gpus * seconds, busy, cost)


def _cost(gpu_seconds: float, cpu_seconds: float, prices: Prices | None) -> float | None:
    if prices is None:
        return None
    return (gpu_seconds * prices.gpu_hour + cpu_seconds * prices.cpu_hour) / HOUR


def savings(state: State, brief: Brief) -> Savings | None:
    """Returns what an attempt saves beside the unchanged model; None where a throughput was not measured."""
    beside = brief.verdict.beside.measurements if brief.verdict.beside else None
    before = beside or (state.baseline.verdict.measurements if state.baseline else None)
    pair = (before, brief.verdict.measurements)
    if not all(pair) or not all(each.device_seconds_per_million_tokens for each in pair):
        return None
    on_gpu = state.target != "cpu"
    hours = [_hours(each, on_gpu) for each in pair]
    price = state.prices and (state.prices.gpu_hour if on_gpu else state.prices.cpu_hour)
    costs = [hour * price for hour in hours] if price else [None, None]
    spent = ledger(state)
    if price:
        paid, saved = spent.cost, costs[0] - costs[1]
    else:
        paid, saved = (spent.gpu_hours if on_gpu else spent.cpu_hours), hours[0] - hours[1]
    tokens = (MILLION * paid / saved if saved > 0 else math.inf) if paid else None
    return Savings(*hours, *costs, tokens)


def _hours(measured: Measurements, on_gpu: bool) -> float:
    """Hours of one device for a million tokens: of GPUs, or of the cores that computed."""
    return measured.device_seconds_per_million_tokens * (1 if on_gpu else max(1, measured.cores)) / HOUR


def exhausted(state: State) -> str:
    """Returns why the budget allows no further attempt, in a sentence; "" where it does, or there is none.

    What an attempt will take is not known before: it is expected to take what the cheapest before it took.
    """
    if state.limits is None:
        return ""
    spent, count = ledger(state), len(state.history)
    attempts = [spent.of(number) for number in range(1, count + 1)]
    quantities = {
        "GPU hours": (state.limits.gpu_hours, lambda part: part.gpu_hours),
        "CPU hours": (state.limits.cpu_hours, lambda part: part.cpu_hours),
        spent.currency: (state.limits.cost, lambda part: part.cost or 0.0),
    }
    for unit, (limit, amount) in quantities.items():
        if limit is None:
            continue
        used, least = amount(spent), min(map(amount, attempts), default=0.0)
        if used >= limit or used + least > limit:
            told = f"the budget of {limit:g} {unit} ends the run: {used:.2f} {'is' if used < 2 else 'are'} spent"
            return told if used >= limit else f"{told}, and no attempt took less than {least:.2f}"
    return ""
