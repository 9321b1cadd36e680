"""What an attempt lost, in rows and sentences: the damage card of its verdict."""

from __future__ import annotations

from trimtab.judge import Damage, Interval, Verdict
from trimtab.judge.damage import PlaceDamage, TaskDamage
from trimtab.loop.state import Brief, State
from trimtab.report.rows import fraction, interval_text, one_line
from trimtab.report.story import accepted

#: Tiers in the order in which they are shown.
_ORDER = ("critical", "supporting", "advisory")
#: Headings of `task_rows`.
TASK_COLUMNS = ("task", "tier", "items", "baseline", "this attempt", "lost", "gained", "recovery")


def shown(state: State) -> tuple[int, Brief] | None:
    """Returns the attempt whose card a run's report shows, and its number: the accepted one, else the last with one."""
    numbered = list(enumerate(state.history, start=1))
    carded = [pair for pair in numbered if pair[1].verdict.damage and pair[1].verdict.damage.tasks]
    return next((pair for pair in carded if accepted(state) == pair), carded[-1] if carded else None)


def ordered(card: Damage) -> list[TaskDamage]:
    """Returns the tasks by tier, and of each tier the one that keeps least first."""

    def place(task: TaskDamage) -> tuple[int, float]:
        return _ORDER.index(task.tier), task.recovery.estimate if task.recovery else float("inf")

    return sorted(card.tasks, key=place)


def task_rows(card: Damage) -> list[tuple[str, ...]]:
    """Returns the cells of `TASK_COLUMNS`, a task a row."""
    return [
        (
            one_line(task.task),
            f"{task.tier}, at least {task.limit:g}" if task.limit else task.tier,
            f"{task.items:,}",
            fraction(task.baseline),
            fraction(task.candidate),
            f"{task.lost:,}",
            f"{task.gained:,}",
            interval_text(task.recovery) if task.recovery else "baseline at chance",
        )
        for task in ordered(card)
    ]


def text_rows(card: Damage) -> list[tuple[str, str]]:
    """Returns (what, value) of everything that the text says: perplexity by place, divergence, agreement."""
    found = [(_span(place), interval_text(place.perplexity_ratio)) for place in card.places]
    if card.kl:
        found.append(("KL divergence of the next token, nats", _small(card.kl)))
    if card.agreement:
        found.append(("same likeliest token", interval_text(card.agreement)))
    return found


def _span(place: PlaceDamage) -> str:
    return f"perplexity ratio, tokens {place.first:,} to {place.last:,}"


def _small(interval: Interval) -> str:
    return f"{interval.estimate:.4f} ({interval.low:.4f} to {interval.high:.4f})"


def worst_text(verdict: Verdict) -> str:
    """Returns which task keeps least, in a sentence; "" where tasks are not told apart."""
    card = verdict.damage
    task = next((task for task in card.tasks if task.task == card.worst), None) if card else None
    if task is None or len(card.tasks) < 2:
        return ""
    flips = f"{task.lost:,} of {task.items:,} answers lost and {task.gained:,} gained"
    return f"Of {len(card.tasks)} tasks {one_line(task.task)} keeps least: {interval_text(task.recovery)}, {flips}."


def text_sentence(verdict: Verdict) -> str:
    """Returns how the text tells the two models apart, in a sentence; "" where nobody told."""
    card = verdict.damage
    if card is None or card.kl is None or card.agreement is None:
        return ""
    told = f"The next token's distribution is {card.kl.estimate:.3f} nats from the baseline's, and"
    told += f" {100 * card.agreement.estimate:.1f} % of the likeliest tokens are the same"
    if len(card.places) > 1:
        first, last = card.places[0], card.places[-1]
        told += (
            f"; the perplexity ratio is {fraction(first.perplexity_ratio.estimate)} within {first.last} tokens and "
            f"{fraction(last.perplexity_ratio.estimate)} from {last.first} on"
        )
    return f"{told}."


def sentences(verdict: Verdict) -> list[str]:
    """Returns what a card says in brief."""
    return [told for told in (worst_text(verdict), text_sentence(verdict)) if told]


def markdown_lines(state: State) -> list[str]:
    """Returns the card of a run as the items of a list, without escapes; [] for none."""
    found = shown(state)
    if found is None:
        return []
    number, brief = found
    lines = [f"What attempt {number}, {one_line(brief.recipe.title)}, kept by task:", ""]
    for task, tier, items, before, after, lost, gained, recovery in task_rows(brief.verdict.damage):
        flips = f"{lost} lost and {gained} gained of {items}"
        lines.append(f"- {task} ({tier}): recovery {recovery}; {before} → {after}, {flips}")
    lines += [f"- {what}: {value}" for what, value in text_rows(brief.verdict.damage)]
    return [*lines, ""]
