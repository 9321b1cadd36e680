"""Items on grammar: minimal pairs of sentences, one right and one wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from trimtab.components.validation.suite.items import Item, Section, Tables, drawn, pair, with_article


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
