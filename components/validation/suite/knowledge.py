"""Items on what people know: the world, kinds of things, and common sense."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from trimtab.components.validation.suite.items import (
    Fact,
    Section,
    Tables,
    ask,
    capitalized,
    other,
    shuffled,
    stated,
    with_article,
)


def geography(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions about countries, cities, states, landmarks and currencies."""
    countries, templates = tables["countries"], tables["templates"]

    def fact(kind: str, right: str, pool: Sequence[str], banned: Sequence[str] = (), **slots: str) -> Fact:
        texts = shuffled(templates[kind], rng)
        return [
            ask(capitalized(text.format(**slots)), right, other(pool, [right, *banned], 3, rng))
            for text in texts
        ]

    def column(index: int) -> list[tuple[str, str]]:
        return [(name, row[index]) for name, row in countries.items() if row[index]]

    names = [name for name, row in countries.items() if row[0]]
    capitals, languages, nationalities = column(0), column(2), column(3)
    yield [fact("capital", city, [c for _, c in capitals], country=name) for name, city in capitals]
    yield [fact("country", name, names, capital=city) for name, city in capitals]
    yield [fact("continent", part, tables["continents"], country=name) for name, part in column(1)]
    section = []
    for name, language in languages:
        related = [word for group in tables["related_languages"] if language in group for word in group]
        banned = [*related, tables["language_never_a_distractor"]]
        section.append(fact("language", language, [word for _, word in languages], banned, country=name))
    yield section
    yield [
        fact("nationality", word, [w for _, w in nationalities], country=name) for name, word in nationalities
    ]
    for kind, table in (("city", "cities"), ("state", "states")):
        yield [
            fact(kind, place, list(tables[table]), city=city)
            for place, cities in tables[table].items()
            for city in cities
        ]
    landmarks, currencies = tables["landmarks"], tables["currencies"]
    yield [
        fact("landmark", place, list(landmarks.values()), landmark=name) for name, place in landmarks.items()
    ]
    yield [
        fact("currency", money, list(currencies.values()), country=name) for name, money in currencies.items()
    ]
    yield stated(tables["single_facts"])


def categories(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions for the category of a member, of a group of members, and for one more member."""
    entries, templates = tables["categories"], tables["templates"]

    def far(entry: Tables) -> list[Tables]:
        return [
            e
            for e in entries
            if e is not entry and e["label"] not in entry["near"] and entry["label"] not in e["near"]
        ]

    singles, groups, examples = [], [], []
    for entry in entries:
        style = entry.get("style", "kind")
        for member in entry["members"]:
            if style == "group":
                break
            pool = [e["label"] for e in far(entry) if style == "kind" or e["label"][0] not in "aeiou"]
            name = with_article(member) if entry["article"] else member
            singles.append(
                [
                    ask(text.format(a=name, A=capitalized(name)), entry["label"], other(pool, [], 3, rng))
                    for text in shuffled(templates[style], rng)
                ]
            )
        for _ in range(8):
            x, y, z = rng.sample(entry["members"], 3)
            slots = {"x": x, "y": y, "z": z, "X": capitalized(x), "plural": entry["plural"]}
            pool = [e["plural"] for e in far(entry)]
            groups.append(
                [
                    ask(
                        rng.choice(templates["group"]).format(**slots),
                        entry["plural"],
                        other(pool, [], 3, rng),
                    )
                ]
            )
            pool = [rng.choice(e["members"]) for e in far(entry)]
            examples.append(
                [ask(rng.choice(templates["example"]).format(**slots), z, other(pool, [x, y, z], 3, rng))]
            )
    yield from (singles, singles[::2], groups, examples)


def common_sense(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions about uses, places, jobs, colours, animals, bodies and what happens next."""

    def fact(table: Tables, who: str, right: str, pool: Sequence[str], banned: Sequence[str]) -> Fact:
        texts = shuffled(table["templates"], rng)
        return [
            ask(text.format(who=who, Who=capitalized(who)), right, other(pool, [right, *banned], 3, rng))
            for text in texts
        ]

    for name in ("uses", "workplaces", "jobs", "places", "materials"):
        table = tables[name]
        yield [
            fact(table, who, right, [r for _, r, d in table["rows"] if d != domain], [])
            for who, right, domain in table["rows"]
        ]
    for name in ("colors", "sounds", "voices", "young", "body"):
        table = tables[name]
        pool = table.get("names") or [row[1] for row in table["rows"]]
        yield [fact(table, who, right, pool, banned) for who, right, *banned in table["rows"]]
    for name in ("properties", "endings"):
        yield stated(tables[name])
