"""Generate the items of the evaluation suite from the fact tables.

The items are a pure function of the tables in ``facts/`` and of :data:`SEED`: the same sources give the same
bytes.

Usage: ``python -m trimtab.components.validation.suite.generate [--output FOLDER]``
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SEED = 20240607
ITEMS_PER_TASK = 540
FOLDER = Path(__file__).resolve().parent


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


def drawn(make: Callable[[], Item], count: int = 300) -> Section:
    """Return a section of independent random items."""
    return [[make()] for _ in range(count)]


# Grammar: minimal pairs


def subject_verb_agreement(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield pairs of sentences that differ in the number of the verb, often with another noun between."""

    def numbers() -> tuple[int, int]:
        head = rng.randrange(2)
        return head, 1 - head if rng.random() < 0.75 else head

    def sentence(subject: str, predicate: Sequence[str], number: int) -> Item:
        right, wrong, rest = predicate[number], predicate[1 - number], predicate[2]
        return pair(f"{subject} {right} {rest}.", f"{subject} {wrong} {rest}.")

    def beside(heads: str, places: str, predicates: str) -> Item:
        number, distracting = numbers()
        head, place = rng.choice(tables[heads]), rng.choice(tables[places])
        subject = f"the {head[number]} {place[distracting]}"
        return sentence(subject, rng.choice(tables[predicates]), number)

    def thing_with() -> Item:
        number, distracting = numbers()
        thing = rng.choice(tables["things_with"])
        subject = f"the {thing[number]} {thing[2]} the {thing[3 + distracting]}"
        return sentence(subject, rng.choice(tables["things_predicates"]), number)

    def thing_that() -> Item:
        number, distracting = numbers()
        thing, clause = rng.choice(tables["things_with"]), rng.choice(tables["things_that"])
        subject = f"the {thing[number]} that the {clause[distracting]} {clause[2]}"
        return sentence(subject, rng.choice(tables["things_predicates"]), number)

    def simple() -> Item:
        number = rng.randrange(2)
        kind = rng.choice(["people", "animals"])
        determiner = rng.choice(["the", "my", "our", "his", "her"])
        subject = f"{determiner} {rng.choice(tables[kind])[number]}"
        return sentence(subject, rng.choice(tables[f"{kind}_predicates"]), number)

    def pronoun() -> Item:
        number = rng.randrange(2)
        subject = rng.choice(tables["pronouns"][["singular", "plural"][number]])
        return sentence(subject, rng.choice(tables["people_predicates"]), number)

    def both() -> Item:
        first, second = rng.sample(tables["people"], 2)
        return sentence(f"the {first[0]} and the {second[0]}", rng.choice(tables["people_predicates"]), 1)

    def one_of() -> Item:
        people = rng.choice(tables["people"])
        subject = rng.choice(
            [f"one of the {people[1]}", f"every {people[0]} in the village", f"each {people[0]} in the room"]
        )
        return sentence(subject, rng.choice(tables["people_predicates"]), 0)

    def there() -> Item:
        number = rng.randrange(2)
        noun, place = rng.choice(tables["small_things"]), rng.choice(tables["places"])
        phrase = with_article(noun[0]) if number == 0 else f"{rng.choice(tables['numbers'])} {noun[1]}"
        right, wrong = rng.choice([("is", "are"), ("was", "were")])[:: 1 - 2 * number]
        return pair(f"there {right} {phrase} {place}.", f"there {wrong} {phrase} {place}.")

    def question() -> Item:
        number, distracting = numbers()
        noun = rng.choice(tables["people"])[number]
        place = rng.choice(tables["animals_near"])
        phrase = f"the {noun} {place[distracting]}"
        start, end = rng.choice(
            [
                (("is", "are"), "ready"),
                (("does", "do"), "need help"),
                (("has", "have"), "seen us"),
                (("was", "were"), "here yesterday"),
            ]
        )
        return pair(f"{start[number]} {phrase} {end}?", f"{start[1 - number]} {phrase} {end}?")

    yield drawn(lambda: beside("people", "people_near", "people_predicates"))
    yield drawn(lambda: beside("people", "people_who", "people_predicates"))
    yield drawn(lambda: beside("animals", "animals_near", "animals_predicates"))
    for make in (thing_with, thing_that, simple, pronoun, both, one_of, there, question):
        yield drawn(make)


def pronoun_agreement(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield pairs that differ in a determiner, a noun's number, a reflexive or the case of a pronoun."""

    def determiner() -> Item:
        number = rng.randrange(2)
        thing = rng.choice(tables["things"])
        adjective = rng.choice(["", rng.choice(tables["adjectives"]) + " "])
        carrier = rng.choice(tables["determiner_carriers"])
        if rng.random() < 0.5:
            chosen = rng.choice(tables["determiners"][["singular", "plural"][number]])
            phrases = [f"{chosen} {adjective}{thing[index]}" for index in (number, 1 - number)]
        else:
            swap = rng.choice(tables["swaps"])
            phrases = [f"{swap[index]} {adjective}{thing[number]}" for index in (number, 1 - number)]
        return pair(*(carrier.format(np=phrase) for phrase in phrases))

    def article() -> Item:
        right = with_article(rng.choice(tables["article_nouns"]))
        start, noun = right.split(" ", 1)
        wrong = f"{'an' if start == 'a' else 'a'} {noun}"
        carrier = rng.choice(tables["article_carriers"])
        return pair(carrier.format(np=right), carrier.format(np=wrong))

    def quantity() -> Item:
        mass = rng.random() < 0.5
        noun = rng.choice(tables["mass_nouns"]) if mass else rng.choice(tables["things"])[1]
        carrier = rng.choice(tables["mass_carriers"])[0 if mass else 1]
        right, wrong = ("much", "many") if mass else ("many", "much")
        return pair(carrier.format(q=right, n=noun), carrier.format(q=wrong, n=noun))

    def reflexive() -> Item:
        phrase = rng.choice(tables["reflexive_phrases"])
        forms = tables["reflexive_pronouns"]
        kind = rng.choice(["male", "female", "plural", "pronoun"])
        if kind == "pronoun":
            subject = rng.choice(list(forms))
            right = forms[subject]
            wrong = rng.choice([form for form in forms.values() if form != right])
        else:
            subject = rng.choice(tables[kind])
            right = {"male": "himself", "female": "herself", "plural": "themselves"}[kind]
            # A singular "themselves" is not wrong beyond dispute.
            wrong = rng.choice([form for form in ("himself", "herself") if form != right])
        return pair(f"{subject} {phrase.format(r=right)}.", f"{subject} {phrase.format(r=wrong)}.")

    def far_reflexive() -> Item:
        kind, distracting = rng.sample(["male", "female", "plural"], 2)
        forms = {"male": "himself", "female": "herself", "plural": "themselves"}
        heads = {
            "male": ["brother", "father", "uncle"],
            "female": ["sister", "mother", "aunt"],
            "plural": ["friends", "neighbors"],
        }
        owners = {
            "male": ["king", "boy", "old man"],
            "female": ["queen", "girl", "old woman"],
            "plural": ["students", "children", "players"],
        }
        phrase = rng.choice(tables["reflexive_phrases"])
        subject = f"the {rng.choice(heads[kind])} of the {rng.choice(owners[distracting])}"
        return pair(
            f"{subject} {phrase.format(r=forms[kind])}.", f"{subject} {phrase.format(r=forms[distracting])}."
        )

    def case() -> Item:
        right = rng.randrange(2)
        forms = rng.choice(tables["cases"])
        carrier = rng.choice(tables[["subject_carriers", "object_carriers"][right]])
        return pair(carrier.format(p=forms[right]), carrier.format(p=forms[1 - right]))

    def possessive() -> Item:
        right = rng.randrange(2)
        forms = rng.choice(tables["possessives"])
        carrier = rng.choice(tables[["before_noun_carriers", "alone_carriers"][right]])
        return pair(carrier.format(p=forms[right]), carrier.format(p=forms[1 - right]))

    def tag() -> Item:
        kind = rng.choice(["male", "female", "plural"])
        number = int(kind == "plural")
        statement = rng.choice(tables["tags"])
        start = f"{rng.choice(tables[kind])} {statement[number]}, {statement[2 + number]}"
        pronouns = {"male": ("he", "they"), "female": ("she", "they"), "plural": ("they", "she")}[kind]
        return pair(*(f"{start} {word}?" for word in pronouns))

    def relative() -> Item:
        person = rng.random() < 0.5
        if person:
            start, rest = (
                f"the {rng.choice(['man', 'woman', 'boy', 'girl', 'doctor', 'teacher'])}",
                "is my friend",
            )
            clause = rng.choice(tables["who_clauses"])
        else:
            start, rest = f"the {rng.choice(tables['things'])[0]}", "is mine"
            clause = rng.choice(tables["which_clauses"])
        right, wrong = ("who", "which") if person else ("which", "who")
        return pair(f"{start} {right} {clause} {rest}.", f"{start} {wrong} {clause} {rest}.")

    for make in (
        determiner,
        determiner,
        reflexive,
        reflexive,
        far_reflexive,
        case,
        case,
        article,
        quantity,
        possessive,
        tag,
        relative,
    ):
        yield drawn(make)


# Words


def antonyms(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions for the opposite of a word; a distractor never comes from the word's own cluster."""
    templates = tables["templates"]
    section: Section = []
    for part_of_speech in ("adjectives", "nouns", "verbs", "others"):
        clusters = [[word for words in cluster for word in words] for cluster in tables[part_of_speech]]
        pool = [word for cluster in clusters for word in cluster]
        for cluster, pairs in zip(clusters, tables[part_of_speech], strict=True):
            for word, opposite in itertools.chain.from_iterable(
                itertools.permutations(words) for words in pairs
            ):
                texts = rng.sample(templates, len(templates))
                section.append(
                    [
                        ask(
                            text.format(word=word, Word=capitalized(word)),
                            opposite,
                            other(pool, cluster, 3, rng),
                        )
                        for text in texts
                    ]
                )
    yield section


def plurals(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions for the plural of a noun: irregular, changed in spelling, and plain."""

    def fact(noun: str, right: str, wrong: Sequence[str]) -> Fact:
        templates = rng.sample(tables["templates"], len(tables["templates"]))
        article = with_article(noun).split()[0]
        return [ask(template.format(noun=noun, a=article), right, wrong) for template in templates]

    yield [fact(noun, forms[0], forms[1:]) for noun, forms in tables["irregular"].items()]
    changed, plain = [], []
    for noun in tables["regular"]:
        if noun.endswith("y") and noun[-2] not in "aeiou":
            changed.append(fact(noun, noun[:-1] + "ies", [noun, noun + "s"]))
        elif noun.endswith("y"):
            changed.append(fact(noun, noun + "s", [noun, noun[: -2 if noun.endswith("ey") else -1] + "ies"]))
        elif noun.endswith(("s", "x", "ch", "sh")):
            changed.append(fact(noun, noun + "es", [noun, noun + "s"]))
        else:
            plain.append(fact(noun, noun + "s", [noun] if noun.endswith("e") else [noun, noun + "es"]))
    yield changed
    yield plain


def doubles(verb: str, tables: Tables) -> bool:
    """Tell whether the verb doubles its last letter before an ending that starts with a vowel."""
    vowels = [letter in "aeiou" for letter in verb]
    short = vowels[-3:] == [False, True, False] and sum(vowels) == 1 and verb[-1] not in "wxy"
    return short or verb in tables["doubles_final_consonant"]


def past_form(verb: str, tables: Tables) -> str:
    """Return the regular past form."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if doubles(verb, tables) else "") + "ed"


def continuous_form(verb: str, tables: Tables) -> str:
    """Return the form in -ing."""
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    return verb + (verb[-1] if doubles(verb, tables) else "") + "ing"


def third_person_form(verb: str) -> str:
    """Return the form that follows "she"."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "ch", "sh", "z", "o")) else "s")


def verb_forms(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions for the form of a verb that the sentence calls for."""
    irregular = tables["irregular"]
    verbs = [verb for verb in (*irregular, *tables["regular"]) if verb not in tables["impersonal"]]

    def fact(form: str, verb: str, right: str, wrong: Sequence[str]) -> Fact:
        templates = rng.sample(tables["templates"][form], len(tables["templates"][form]))
        return [
            ask(template.format(base=verb, name=rng.choice(tables["names"])), right, wrong)
            for template in templates
        ]

    sections: dict[str, Section] = {
        name: []
        for name in ("past irregular", "past regular", "participle", "infinitive", "continuous", "present")
    }
    for verb in verbs:
        past, participle = irregular.get(verb, [past_form(verb, tables)] * 2)
        going, third = continuous_form(verb, tables), third_person_form(verb)
        if verb in irregular:
            childish = going if verb in tables["overregular_form_exists"] else past_form(verb, tables)
            sections["past irregular"].append(fact("past", verb, past, [verb, childish]))
        else:
            sections["past regular"].append(fact("past", verb, past, [verb, going]))
        mistaken = past if past != participle and verb not in tables["past_accepted_as_participle"] else third
        sections["participle"].append(fact("participle", verb, participle, [mistaken, going]))
        mistaken = going if verb in tables["past_is_a_base_too"] else past
        sections["infinitive"].append(fact("infinitive", verb, verb, [third, mistaken]))
        sections["present"].append(fact("present", verb, third, [verb, going]))
        if verb not in tables["stative"]:
            sections["continuous"].append(fact("continuous", verb, going, [verb, third]))
    yield from sections.values()


# Knowledge


def geography(tables: Tables, rng: random.Random) -> Iterator[Section]:
    """Yield questions about countries, cities, states, landmarks and currencies."""
    countries, templates = tables["countries"], tables["templates"]

    def fact(kind: str, right: str, pool: Sequence[str], banned: Sequence[str] = (), **slots: str) -> Fact:
        texts = rng.sample(templates[kind], len(templates[kind]))
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
    yield [[ask(context, right, wrong)] for context, right, *wrong in tables["single_facts"]]


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
                    for text in rng.sample(templates[style], len(templates[style]))
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
        texts = rng.sample(table["templates"], len(table["templates"]))
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
        yield [[ask(context, right, wrong)] for context, right, *wrong in tables[name]]


# Numbers and series

UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
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
        texts = rng.sample(templates[kind], len(templates[kind]))
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
                    for text in rng.sample(templates[kind], len(templates[kind]))
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
    yield [[ask(context, right, wrong)] for context, right, *wrong in tables["fixed"]]


# Assembly

BUILDERS: dict[str, Callable[[Tables, random.Random], Iterator[Section]]] = {
    builder.__name__: builder
    for builder in (
        subject_verb_agreement,
        pronoun_agreement,
        antonyms,
        geography,
        arithmetic,
        plurals,
        verb_forms,
        common_sense,
        categories,
        sequences,
    )
}


def queue(section: Section, rng: random.Random) -> Iterator[Item]:
    """Yield the items of a section: one variant of every fact, then the next variant of every fact."""
    facts = rng.sample(section, len(section))
    for variants in itertools.zip_longest(*facts):
        yield from (item for item in variants if item is not None)


def select(sections: Sequence[Section], count: int, rng: random.Random) -> list[Item]:
    """Take items from the sections in turn, none twice, until there are enough."""
    chosen: dict[tuple[str, str], Item] = {}
    queues = [queue(section, rng) for section in sections]
    while len(chosen) < count and queues:
        for items in list(queues):
            fresh = next((item for item in items if item.key not in chosen), None)
            if fresh is None:
                queues.remove(items)
            elif len(chosen) < count:
                chosen[fresh.key] = fresh
    if len(chosen) < count:
        raise ValueError(f"the tables give only {len(chosen)} of {count} items")
    return list(chosen.values())


def read_tables(task: str) -> Tables:
    """Read the fact tables of a task."""
    return yaml.safe_load((FOLDER / "facts" / f"{task}.yaml").read_text(encoding="utf-8"))


def rows(task: str) -> list[dict[str, Any]]:
    """Return the lines of a task's data file, in a random but fixed order."""
    rng = random.Random(f"{SEED}/{task}")
    items = select(list(BUILDERS[task](read_tables(task), rng)), ITEMS_PER_TASK, rng)
    # Any prefix of the file is then a random sample of the task, as tests that stop early need it.
    rng.shuffle(items)
    lines = []
    for number, item in enumerate(items, start=1):
        choices = rng.sample((item.right, *item.wrong), 1 + len(item.wrong))
        lines.append(
            {
                "id": f"{task}-{number:04d}",
                "context": item.context,
                "choices": choices,
                "answer": choices.index(item.right),
            }
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data file of every task."""
    parser = argparse.ArgumentParser(description="Generate the items of the evaluation suite.")
    parser.add_argument("--output", type=Path, default=FOLDER / "data", help="folder of the data files")
    output: Path = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    for task in BUILDERS:
        text = "".join(json.dumps(row) + "\n" for row in rows(task))
        (output / f"{task}.jsonl").write_bytes(text.encode("ascii"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
