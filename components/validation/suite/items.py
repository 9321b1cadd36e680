"""What the items of the suite are made of: questions, their variants, and the words of a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question: the right choice and the wrong ones, each to be read after the context."""

    context: str
    right: str
    wrong: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What two items may not have in common."""
        return self.context, self.right


# The variants of a fact ask for the same knowledge in other words; a section holds facts of one sort.
Fact = list[Item]
Section = list[Fact]
Tables = dict[str, Any]


def ask(context: str, right: str, wrong: Sequence[str]) -> Item:
    """Return an item whose choices continue the context."""
    return Item(context, " " + right, tuple(" " + choice for choice in wrong))


def pair(right: str, wrong: str) -> Item:
    """Return a minimal pair of whole sentences."""
    return Item("", capitalized(right), (capitalized(wrong),))


def capitalized(text: str) -> str:
    """Return the text with a capital first letter, the others unchanged."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return the noun after "a" or "an"."""
    silent_or_spoken = {"hour": "an", "honest": "an", "uniform": "a", "university": "a", "unicycle": "a"}
    article = silent_or_spoken.get(noun.split()[0], "an" if noun[0].lower() in "aeiou" else "a")
    return f"{article} {noun}"


def other(pool: Sequence[str], banned: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Draw distinct members of the pool that are not banned."""
    return rng.sample([choice for choice in dict.fromkeys(pool) if choice not in banned], count)


def shuffled(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Return the texts in a random order."""
    return rng.sample(texts, len(texts))


def stated(rows: Sequence[Sequence[str]]) -> Section:
    """Return a section of the questions that a table has in full: context, right choice, wrong ones."""
    return [[ask(context, right, wrong)] for context, right, *wrong in rows]


def drawn(make: Callable[[], Item], count: int = 300) -> Section:
    """Return a section of independent random items."""
    return [[make()] for _ in range(count)]
