"""Items on numbers and series: small sums, and what comes next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from trimtab.components.validation.suite.items import Fact, Section, Tables, ask, capitalized, other, shuffled, stated

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """Return a number from 0 to 100 in words."""
    if number < 20:
        return UNITS[number]
    if number == 100:
        return "one hundred"
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f"-{UNITS[unit]}" if unit else "")


def close_by(number: int, rng: random.Random, reach: int = 3) -> list[int]:
    """Draw three numbers near a number."""
    near = [n for n in range(number - reach, number + reach + 1) if n != number and 0 <= n <= 100]
    return rng.sample(near, 3)


def arithmetic(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield small sums in words, in figures and in one-line stories."""
    templates = tables["templates"]

    def fact(kind: str, result: int, *numbers: int) -> Fact:
        write = str if kind.startswith("digits") else in_words
        words = [write(number) for number in numbers]
        slots = {"a": words[0], "b": words[-1], "A": capitalized(words[0])}
        texts = shuffled(templates[kind], rng)
        return [
            ask(
                text.format(**slots, name=rng.choice(tables["names"]), things=rng.choice(tables["things"])),
                write(result),
                [write(n) for n in close_by(result, rng)],
            )
            for text in texts
        ]

    small = range(1, 11)
    sums = [(a, b) for a in small for b in small]
    differences = [(a, b) for a in range(2, 16) for b in range(1, min(a, 10))]
    yield [fact("add", a + b, a, b) for a, b in sums]
    yield [fact("subtract", a - b, a, b) for a, b in differences]
    yield [fact("multiply", a * b, a, b) for a in range(2, 11) for b in range(2, 11) if a * b <= 50]
    yield [fact("digits_add", a + b, a, b) for a, b in sums]
    yield [fact("digits_subtract", a - b, a, b) for a, b in differences]
    yield [fact("story_add", a + b, a, b) for a, b in sums if a > 1 and b > 1]
    yield [fact("story_subtract", a - b, a, b) for a, b in differences if b > 1]
    yield [fact("double", 2 * a, a) for a in small] + [fact("half", a, 2 * a) for a in small]
    yield [fact("next", a + 1, a) for a in range(1, 50)]


def sequences(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield starts of series: days, months, letters, numbers up and down, comparisons."""
    templates = tables["templates"]
    days, months, ordinals = tables["days"], tables["months"], tables["ordinals"]
    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]

    def windows(series: Sequence[str], lengths: Sequence[int], cyclic: bool) -> Section:
        facts = []
        for length in lengths:
            for start in range(len(series) if cyclic else len(series) - length):
                shown = [series[(start + step) % len(series)] for step in range(length)]
                right = series[(start + length) % len(series)]
                facts.append([ask(", ".join(shown) + ",", right, other(series, [right, *shown], 3, rng))])
        return facts

    def neighbors(series: Sequence[str], kind: str, step: int, cyclic: bool) -> Section:
        facts = []
        for index, item in enumerate(series if cyclic else series[:-1]):
            right = series[(index + step) % len(series)]
            facts.append(
                [
                    ask(text.format(item=item), right, other(series, [item, right], 3, rng))
                    for text in shuffled(templates[kind], rng)
                ]
            )
        return facts

    def counting(starts: Sequence[int], step: int, write: Callable[[int], str]) -> Section:
        facts = []
        for start in starts:
            shown = [start + step * index for index in range(3)]
            right = start + step * 3
            reach = 3 if abs(step) < 5 else 2 * abs(step)
            wrong = [write(number) for number in close_by(right, rng, reach)]
            facts.append([ask(", ".join(map(write, shown)) + ",", write(right), wrong)])
        return facts

    yield windows(days, (2, 3), cyclic=True)
    yield neighbors(days, "day_after", 1, cyclic=True) + neighbors(days, "day_before", -1, cyclic=True)
    yield windows(months, (2, 3), cyclic=True)
    yield neighbors(months, "month_after", 1, cyclic=True) + neighbors(
        months, "month_before", -1, cyclic=True
    )
    yield windows(letters, (3, 4), cyclic=False)
    yield neighbors(letters, "letter_after", 1, cyclic=False)
    yield windows(ordinals, (2, 3), cyclic=False)
    yield counting(range(0, 41), 1, in_words)
    yield counting(range(4, 31), -1, in_words)
    yield counting(range(0, 97), 1, str)
    yield counting(range(4, 60), -1, str)
    yield counting(range(0, 31, 2), 2, in_words) + counting(range(0, 61, 10), 10, in_words)
    yield (
        counting(range(0, 41, 2), 2, str)
        + counting(range(0, 61, 5), 5, str)
        + counting(range(0, 61, 10), 10, str)
    )
    yield [
        [
            ask(f"{base}, {more},", most, (base, more)),
            ask(f"{capitalized(base)}, {more} and", most, (base, more)),
        ]
        for base, (more, most) in tables["comparatives"].items()
    ]
    yield stated(tables["fixed"])
