"""Which items are asked when: of single tasks as they are, of mixes, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.base.errors import InputError
from trimtab.judge.statistics import paired_recovery
from trimtab.planning.dealing import Deal, Spans, deal, fewest
from trimtab.recipe import Acceptance
from trimtab.recipe.evaluation import Evaluation

#: Items of the splits that lm-eval evaluates.
SIZES = {
    "arc_challenge": 1172, "winogrande": 1267, "piqa": 1838, "openbookqa": 500, "truthfulqa_mc2": 817, "gsm8k": 1319,
    "boolq": 3270, "hellaswag": 10042, "copa": 100,
}  # fmt: skip
SUITE = {f"trimtab_{n}": 540 for n in range(10)}
DEFAULT = Evaluation()


def dealt(*names: str, attempts: int = 5, **settings) -> Deal:
    return deal({name: SIZES[name] for name in names}, Evaluation(**settings), Acceptance(), attempts)


def count(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans.values())


def items(spans: Spans) -> set[tuple[str, int]]:
    return {(task, n) for task, (start, stop) in spans.items() for n in range(start, stop)}


def counts(found: Deal) -> list[int]:
    return [*(count(found.look(n)) for n in (1, 2, 3)), count(found.confirm(0))]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("hellaswag", [400, 600, 1000, 960]),
        ("boolq", [400, 600, 1000, 960]),
        ("arc_challenge", [158, 238, 396, 380]),  # 1172 / 2960 of each
        ("openbookqa", [68, 101, 169, 162]),
        ("winogrande", [171, 257, 428, 411]),
        ("piqa", [248, 373, 621, 596]),
        ("truthfulqa_mc2", [110, 166, 276, 265]),
    ],
)
def test_looks_and_confirmation_of_a_small_task_shrink_alike(task, expected):
    assert counts(dealt(task)) == expected


def test_all_parts_ask_the_same_mixture():
    """Turn by turn, copa's hundred would all be asked in the first look, and none in the confirmation."""
    found = dealt("copa", "hellaswag")
    parts = [found.look(1), found.look(2), found.look(3), found.confirm(0)]
    shares = [(part["copa"][1] - part["copa"][0]) / count(part) for part in parts]
    assert shares == pytest.approx([100 / 2960] * 4, abs=0.003)
    assert counts(found) == [400, 600, 1000, 960]


def test_tasks_of_one_size_take_turns_as_before_items_were_dealt():
    found = deal(SUITE, DEFAULT, Acceptance(), 5)
    assert [set(map(tuple, found.look(n).values())) for n in (1, 2, 3)] == [{(0, 40)}, {(40, 100)}, {(100, 200)}]
    assert set(map(tuple, found.confirm(0).values())) == {(200, 296)}


def test_another_attempt_is_confirmed_on_other_items():
    found = deal(SUITE, DEFAULT, Acceptance(), 5)
    first, second, third, fourth = (items(found.confirm(n)) for n in range(4))
    assert not first & second and not first & third and not second & third
    assert fourth == first, "540 items hold 200 for the looks and three times 96"
    assert [found.asked_again(n) for n in range(4)] == [[], [], [], sorted(SUITE)]


def test_a_task_that_has_no_more_is_asked_again_while_the_others_give_new_items():
    found = dealt("openbookqa", "hellaswag")
    first, second = (items(found.confirm(n)) for n in (0, 1))
    assert {task for task, _ in first & second} == {"openbookqa"} and {t for t, _ in second - first} == {"hellaswag"}
    assert found.asked_again(1) == ["openbookqa"]


sizes = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 5000), min_size=1)


@given(sizes, st.tuples(*[st.integers(0, 900)] * 3), st.integers(0, 900), st.integers(1, 10))
def test_no_item_is_asked_twice_and_none_is_asked_that_is_not_there(there, asked, confirm_items, attempts):
    settings = Evaluation(items=asked, confirm_items=confirm_items)
    try:
        found = deal(there, settings, Acceptance(), attempts)
    except InputError:
        return
    confirmations = [found.confirm(n) for n in range(min([attempts, *found.fresh.values()]))]
    parts = [found.look(1), found.look(2), found.look(3), *confirmations]
    assert len(set().union(*map(items, parts))) == sum(map(count, parts))
    assert all(0 <= start < stop <= there[task] for part in parts for task, (start, stop) in part.items())
    total = min(sum(asked) + confirm_items, sum(there.values()))
    assert sum(counts(found)) == total, "what there is is used"
    for part, wanted in zip(counts(found), [*asked, confirm_items], strict=True):
        # rounded at both ends, and one item for the first look in any case
        assert abs(part - total * wanted / (sum(asked) + confirm_items)) <= 1.5
    assert Deal.parse(found.to_json()) == found


@given(st.integers(1, 400), st.integers(1, 10), st.sampled_from([0.8, 0.9, 0.95, 0.98]))
def test_the_number_that_would_do_does(there, attempts, limit):
    accept = Acceptance(min_recovery=limit)
    try:
        deal({"mine": there}, DEFAULT, accept, attempts)
    except InputError as error:
        enough = int(str(error).split("with fewer than ")[1].split()[0].replace(",", ""))
        assert enough > there
        deal({"mine": enough}, DEFAULT, accept, attempts)


def test_too_few_is_what_an_unchanged_model_could_not_pass_with():
    """`fewest` against the interval that decides, on a baseline that is right in half of the items: it is no more than
    a tenth too careful."""
    alpha = 0.05 * 4 / 7  # of the last look
    enough = fewest(0.95, alpha)
    for n, passes in ((enough, True), (round(0.9 * enough), False)):
        scores = [0.0, 1.0] * (n // 2)
        n = len(scores)
        assert (paired_recovery(scores, scores, [0.0] * n, 1 - 2 * alpha).low >= 0.95) == passes, n


@pytest.mark.parametrize(
    ("there", "settings", "limit", "message"),
    [
        ({"copa": 100}, {}, 0.95, "tasks: copa has 100 items for the looks and the confirmation together"),
        ({"a": 3, "b": 4}, {}, 0.95, "tasks: a, b have 7 items"),
        ({"piqa": 1838}, {"items": (10, 10, 10)}, 0.95, "items: 30 in all are too few, .*; write at least 142 in all"),
        ({"piqa": 1838}, {"confirm_items": 9}, 0.95, "confirm_items: 9 in all are too few, .*; write at least 28"),
        ({"piqa": 1838}, {"items": (0, 600, 1000)}, 0.95, r"items: \[0, 600, 1000\] gives the first look none; write"),
        ({"piqa": 1838}, {"windows": (1, 20, 20)}, 0.95, r"windows: \[1, 20, 20\] gives the first look 1"),
        ({"piqa": 1838}, {"confirm_windows": 0}, 0.95, "confirm_windows: 0 is too few.*or confirm_items: 0"),
        ({"piqa": 1838}, {}, 1.0, "accept.min_recovery: 1 is shown by no number of items"),
    ],
)
def test_what_could_not_end_well_is_refused(there, settings, limit, message):
    with pytest.raises(InputError, match=message):
        deal(there, Evaluation(**settings), Acceptance(min_recovery=limit), 5)


def test_without_a_confirmation_its_windows_may_be_none():
    found = dealt("piqa", confirm_items=0, confirm_windows=0)
    assert found.confirm(0) == {} and counts(found)[3] == 0
