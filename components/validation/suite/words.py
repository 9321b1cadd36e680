"""Items on words: their opposites and their forms."""

from __future__ import annotations

import itertools
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
    with_article,
)


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
                texts = shuffled(templates, rng)
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
        templates = shuffled(tables["templates"], rng)
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
        templates = shuffled(tables["templates"][form], rng)
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
