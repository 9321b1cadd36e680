"""The damage card: by task, by place in the text, and in what would have been said next."""

from __future__ import annotations

import numpy as np
import pytest
from paired import pair

from trimtab.judge import Text, Verdict, judge
from trimtab.judge.damage import damage
from trimtab.recipe import Acceptance


def distributions(probabilities: list[float], tokens: list[int], windows: int = 3, length: int = 5) -> Text:
    """The same distribution at every place; each token that stands there costs one nat."""
    shape = (windows, length, 1)
    return Text(np.ones((windows, length)), np.tile(tokens, shape), np.tile(np.log(probabilities), shape))


def test_flips_in_both_directions_by_task_and_the_worst():
    baseline, candidate = pair(a=33, b=66)
    items = candidate.items.copy()
    items[500:510] = 1.0  # of task a, which the baseline has wrong
    gained = type(candidate)(
        items, candidate.chance, candidate.nll, candidate.tokens, candidate.item_ids, candidate.window_ids,
        candidate.tasks,
    )  # fmt: skip
    found = judge(baseline=baseline, candidate=gained, accept=Acceptance(), look=1)
    card = {task.task: task for task in found.damage.tasks}
    assert (card["a"].lost, card["a"].gained, card["a"].items) == (33, 10, 600)
    assert card["a"].recovery.estimate == pytest.approx(1 - 23 / 330)
    kept = card["b"].recovery
    assert kept.estimate == pytest.approx(0.8) and kept.low < 0.8 < kept.high
    assert found.damage.worst == "b" and card["b"].candidate == pytest.approx(414 / 600)
    assert Verdict.parse(found.to_json()) == found


def test_the_divergence_of_two_known_distributions():
    """KL((.6, .3, .1) from (.5, .2, .3)) with the last event unnamed by both: .6 ln 1.2 + .3 ln 1.5 + .1 ln(1/3)."""
    both = distributions([0.6, 0.3], [7, 8]), distributions([0.5, 0.2], [7, 8])
    card = damage(*pair(a=0), Acceptance(), 0.95, both)
    assert card.kl.estimate == pytest.approx(0.6 * np.log(1.2) + 0.3 * np.log(1.5) + 0.1 * np.log(1 / 3))
    assert card.kl.low == pytest.approx(card.kl.high) and card.agreement.estimate == 1


def test_a_token_that_only_one_names_is_among_the_rest():
    """Of (.6, .3, rest) from (.5 of token 7, .3 of token 9): .6 ln 1.2 + .4 ln(.4 / .5)."""
    both = distributions([0.6, 0.3], [7, 8]), distributions([0.5, 0.3], [7, 9])
    card = damage(*pair(a=0), Acceptance(), 0.95, both)
    assert card.kl.estimate == pytest.approx(0.6 * np.log(1.2) + 0.4 * np.log(0.8))
    apart = damage(*pair(a=0), Acceptance(), 0.95, (distributions([0.6], [7]), distributions([0.6], [8])))
    assert apart.agreement.estimate == 0 and apart.kl.estimate == 0


def test_it_is_never_more_than_the_whole_divergence():
    draw = np.random.default_rng(0)
    p, q = (np.sort(draw.dirichlet(np.ones(50), size=(4, 6)))[..., ::-1] for _ in range(2))
    order = [np.argsort(draw.random((4, 6, 50)), axis=-1) for _ in range(2)]
    whole = np.zeros((4, 6, 50)), np.zeros((4, 6, 50))
    for full, probabilities, tokens in zip(whole, (p, q), order, strict=True):
        np.put_along_axis(full, tokens, probabilities, -1)
    exact = float((whole[0] * np.log(whole[0] / whole[1])).sum(-1).mean())
    kept = [Text(np.ones((4, 6)), o[..., :20], np.log(d[..., :20])) for o, d in zip(order, (p, q), strict=True)]
    assert 0 < damage(*pair(a=0), Acceptance(), 0.95, tuple(kept)).kl.estimate < exact


def test_perplexity_by_place():
    """Twice the nats from the 64th token on: short context is unharmed."""
    nll = np.ones((3, 255))
    longer = nll.copy()
    longer[:, 63:] += np.log(1.5)
    none = np.zeros((3, 255, 0))
    card = damage(*pair(a=0), Acceptance(), 0.95, (Text(nll, none, none), Text(longer, none, none)))
    assert [(place.first, place.last) for place in card.places] == [(1, 63), (64, 255)]
    assert [place.perplexity_ratio.estimate for place in card.places] == pytest.approx([1.0, 1.5])
    assert card.kl is None and card.agreement is None


@pytest.mark.parametrize(
    ("length", "spans"),
    [(31, [(1, 31)]), (63, [(1, 63)]), (1500, [(1, 63), (64, 255), (256, 1023), (1024, 1500)])],
)
def test_spans_grow_with_the_text(length, spans):
    nll, none = np.ones((2, length)), np.zeros((2, length, 0))
    card = damage(*pair(a=0), Acceptance(), 0.95, (Text(nll, none, none),) * 2)
    assert [(place.first, place.last) for place in card.places] == spans


def test_text_of_other_windows_is_no_card():
    assert damage(*pair(a=0), Acceptance(), 0.95, (distributions([1.0], [1]), distributions([1.0], [1], 2))).kl is None
